"""One stream of a party at the owner: chunks in, frames to the desk, replies out, never more than the window under way.

A reader thread takes chunks until the window is full and then stops reading, so that a party that sends too much is slowed by the
transport and takes no memory. The replies leave in the order in which they are ready. A frame that cannot be trusted ends the
stream with a refusal; a whole frame that asks for something illegal is refused alone.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from deltaloom.errors import ResourceError
from deltaloom.private.desk import Desk, Visit, refusal_of
from deltaloom.private.journal import log
from deltaloom.private.refused import Refused
from deltaloom.private.wire.convert import Hello, Refusal, decode_message, prepare
from deltaloom.private.wire.frame import Assembler, Frame, chunks
from deltaloom.private.wire.schema import Head, check_header

MOST_WINDOW = 1024
LOSSLESS = "fp32"   # of frames without crossing tensors: any codec would do


@dataclass
class _Waiting:
    """A request under way; `done` once it was answered, or given up at its deadline."""

    id: int
    until: float
    done: bool = False


@dataclass
class Stream:
    """The owner's end of one stream. `still_good` raises when the caller's certificate is no longer good."""

    party: str
    desk: Desk
    workers: Executor
    still_good: Callable[[], None]
    _out: queue.SimpleQueue[bytes | None] = field(default_factory=queue.SimpleQueue)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _waiting: list[_Waiting] = field(default_factory=list)
    _greeting: bytes = b""
    _ending: Refusal | None = None
    _reading: bool = True
    _slots: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(1))

    def greet(self, incoming: Iterator[bytes]) -> Visit:
        """Read the stream's first frame, which has to be a hello, and answer it.

        Raises:
            Refused: it is none, or the policy refuses it.
        """
        assembler = self._assembler()
        for chunk in incoming:
            frame = assembler.feed(chunk)
            if frame is None:
                continue
            head: Head = frame.header
            if head.kind.name != "hello":
                raise Refused("order", "a stream begins with a hello", got=head.kind.name)
            if head.party != self.party:
                raise Refused("party", "a frame speaks for somebody else", got=head.party, legal=self.party)
            hello = decode_message(head, frame.body, self.desk.bounds)
            if not isinstance(hello, Hello):
                raise Refused("order", "a stream begins with a hello")
            welcome = self.desk.welcome(self.party, hello)
            self._slots = threading.Semaphore(welcome.window)
            self._greeting = prepare(welcome, LOSSLESS).frame(id=head.id, party=self.party)
            return Visit(self.party, hello)
        assembler.finish()
        raise Refused("truncated", "a stream ended before its hello")

    def serve(self, incoming: Iterator[bytes], visit: Visit) -> Iterator[bytes]:
        """The chunks of all replies, until the party ends the stream or `end` is called."""
        reader = threading.Thread(target=self._read, args=(incoming, visit), name=f"reader-{self.party}", daemon=True)
        reader.start()
        try:
            yield from chunks(self._greeting)
            yield from self._replies()
            if self._ending is not None:
                yield from chunks(self.refusal(self._ending))
        finally:
            self.end(Refusal("stopping", "The stream is over."))
            self._slots.release(MOST_WINDOW)   # a reader that waits for room finds that the stream is ending

    def _replies(self) -> Iterator[bytes]:
        while True:
            try:
                data = self._out.get(timeout=self._patience())
            except queue.Empty:
                self._give_up()
                continue
            if data is not None:
                yield from chunks(data)
                self._slots.release()
            if self._over():
                return

    def end(self, refusal: Refusal) -> None:
        """Answer what is under way, take nothing new, and end with a refusal."""
        with self._lock:
            self._ending = self._ending or refusal
        self._out.put(None)

    def refusal(self, refusal: Refusal) -> bytes:
        """The frame of a refusal of the whole stream."""
        return prepare(refusal, LOSSLESS).frame(id=0, party=self.party)

    def _assembler(self) -> Assembler:
        bounds = self.desk.bounds

        def judge(header: dict[str, Any]) -> tuple[Head, int]:
            self.still_good()
            head = check_header(header, bounds, asks=True)
            return head, head.size

        return Assembler(judge, bounds.most_body)

    def _read(self, incoming: Iterator[bytes], visit: Visit) -> None:
        assembler = self._assembler()
        try:
            for chunk in incoming:
                frame = assembler.feed(chunk)
                if frame is not None and not self._begin(frame, visit):
                    break
            else:
                if self._ending is None:
                    assembler.finish()
        except Refused as refusal:
            self._refuse(refusal)
        except Exception as error:  # the transport's: the party is gone, or the stream was cancelled
            log("stream broken", party=self.party, error=type(error).__name__)
        finally:
            self._reading = False
            self._out.put(None)

    def _begin(self, frame: Frame, visit: Visit) -> bool:
        """Hand a request to a worker, as soon as the window has room; False if the stream is ending."""
        self._slots.acquire()
        with self._lock:
            if self._ending is not None:
                return False
            waiting = _Waiting(frame.header.id, time.monotonic() + self.desk.policy.limits.request_seconds)
            self._waiting.append(waiting)
            self._out.put(None)   # the writer has a deadline to watch now
        self.workers.submit(self._work, frame, visit, waiting)
        return True

    def _work(self, frame: Frame, visit: Visit, waiting: _Waiting) -> None:
        data: bytes | None = None
        try:
            data = self.desk.answer(visit, frame)
        except ResourceError as error:
            log("resources", party=self.party, error=str(error)[:200])
            self.end(Refusal("resources", str(error)[:500]))
        except Exception as error:  # of the desk itself: this stream ends, the others go on
            log("desk failed", party=self.party, error=repr(error)[:200])
            self.end(refusal_of(error))
        with self._lock:
            if not waiting.done:
                waiting.done = True
                self._waiting.remove(waiting)
                self._out.put(data)

    def _patience(self) -> float | None:
        with self._lock:
            return max(0.01, self._waiting[0].until - time.monotonic()) if self._waiting else None

    def _give_up(self) -> None:
        """Refuse the requests whose time is over; their workers' answers come too late."""
        now = time.monotonic()
        with self._lock:
            late = [waiting for waiting in self._waiting if waiting.until <= now]
            self._waiting = [waiting for waiting in self._waiting if waiting.until > now]
            for waiting in late:
                waiting.done = True
        for waiting in late:
            self.desk.metrics.refused("deadline")
            refusal = Refusal("deadline", "The owner took longer than it may.")
            self._out.put(prepare(refusal, LOSSLESS).frame(id=waiting.id, party=self.party))

    def _over(self) -> bool:
        with self._lock:
            return not self._waiting and self._out.empty() and (self._ending is not None or not self._reading)

    def _refuse(self, refusal: Refused) -> None:
        self.desk.metrics.refused(refusal.reason)
        log("stream refused", party=self.party, reason=refusal.reason)
        self.end(Refusal(refusal.reason, str(refusal)[:2000]))

