"""A channel inside one process: for tests, and for an owner that tries its own split."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from deltaloom.private.messages import Answering, BackFacts, Reply, Request

Through = Callable[[Request], Request]
Back = Callable[[Reply], Reply]


class LocalChannel:
    """Hands requests to the owner's end directly; with `window` 1 in the caller's own thread, else in that many others.

    `outward` and `homeward` change messages on their way: the wire's encoding and decoding, or a test's faults.
    """

    def __init__(self, answering: Answering, party: str = "party", *, window: int = 1, outward: Through | None = None,
                 homeward: Back | None = None) -> None:
        self._answering = answering
        self._party = party
        self._window = window
        self._outward = outward
        self._homeward = homeward
        self._pool = ThreadPoolExecutor(window) if window > 1 else None
        self._room = threading.BoundedSemaphore(window)

    @property
    def facts(self) -> BackFacts:
        """The back at the other end."""
        return self._answering.facts

    @property
    def window(self) -> int:
        """Requests that may be under way at once."""
        return self._window

    def submit(self, request: Request) -> Future[Reply]:
        """See `messages.Channel`."""
        self._room.acquire()
        if self._pool is not None:
            return self._pool.submit(self._call, request)
        future: Future[Reply] = Future()
        try:
            future.set_result(self._call(request))
        except Exception as error:
            future.set_exception(error)
        return future

    def _call(self, request: Request) -> Reply:
        try:
            sent = request if self._outward is None else self._outward(request)
            reply = self._answering.answer(self._party, sent)
            return reply if self._homeward is None else self._homeward(reply)
        finally:
            self._room.release()

    def close(self) -> None:
        """Waits for what is under way."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
