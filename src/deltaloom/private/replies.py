"""Recent replies: a repeated request gets the same answer; one that comes while the first is computed waits for it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class _Entry(Generic[T]):
    digest: bytes
    future: Future[T] = field(default_factory=Future)


class Replies(Generic[T]):
    """The last `most` replies of each party; safe to use from several threads.

    A request is known by its key and a digest of its bytes. One with the same key and other bytes (a party that goes on from an
    earlier checkpoint may draw other noise) is a new request: training steps change nothing at the owner.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._parties: dict[str, OrderedDict[Hashable, _Entry[T]]] = {}

    def known(self, party: str, key: Hashable, digest: bytes) -> bool:
        """Whether this very request is being answered or was, recently."""
        with self._lock:
            entries = self._parties.get(party)
            entry = None if entries is None else entries.get(key)
            return entry is not None and entry.digest == digest

    def answer(self, party: str, key: Hashable, digest: bytes, compute: Callable[[], T], seconds: float) -> tuple[T, bool]:
        """The reply, and whether it is a repeat. An error is raised to all who wait for it and then forgotten.

        Raises:
            TimeoutError: a first request with the same bytes is not answered in time.
        """
        with self._lock:
            entries = self._parties.setdefault(party, OrderedDict())
            entry = entries.get(key)
            mine = entry is None or entry.digest != digest
            if entry is None or mine:
                entry = entries[key] = _Entry(digest)
            entries.move_to_end(key)
            while len(entries) > self._most:
                entries.popitem(last=False)
        if not mine:
            return entry.future.result(timeout=seconds), True
        try:
            entry.future.set_result(compute())
        except BaseException as error:
            with self._lock:
                if self._parties[party].get(key) is entry:
                    del self._parties[party][key]
            entry.future.set_exception(error)
            raise
        return entry.future.result(), False
