"""The party's end of a stream: a `Channel` that survives cut connections and a restarted owner.

Every request is kept as it was sent until it is answered. When the stream breaks, the client connects again, waiting a little
longer each time, and sends what is unanswered once more, in order; the owner gives a repeat the same answer. What the owner
refuses for good is raised by the request's future, or, if it concerns the whole stream, by all of them.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from deltaloom.errors import DeltaloomError, RefusedError
from deltaloom.private.desk import as_error
from deltaloom.private.journal import log
from deltaloom.private.membership import Membership
from deltaloom.private.messages import (
    BackFacts,
    ExtendReply,
    ExtendRequest,
    GradientReply,
    GradientRequest,
    LossReply,
    LossRequest,
    OutputsReply,
    OutputsRequest,
    ScoreReply,
    ScoreRequest,
)
from deltaloom.private.refused import AGAIN, Refused
from deltaloom.private.round_messages import AnswerReply, AnswerRequest, StandReply, StandRequest
from deltaloom.private.transport import ENROL, KEEPALIVE_SECONDS, STREAM, grpc, secure_channel, told
from deltaloom.private.wire.convert import Hello, Refusal, Welcome, decode_message, encode_message, expected
from deltaloom.private.wire.frame import Assembler, chunks
from deltaloom.private.wire.schema import Bounds, Head, check_header
from deltaloom.settings import Settings

REPLIES: dict[type, type] = {LossRequest: LossReply, OutputsRequest: OutputsReply, GradientRequest: GradientReply,
                             ScoreRequest: ScoreReply, ExtendRequest: ExtendReply, StandRequest: StandReply,
                             AnswerRequest: AnswerReply}
GREETING = Bounds(width=1, outputs=1, positions=None, tokens=1, rows=1, values=1, session_tokens=1, codecs=frozenset())
MOST_BROKEN = 20   # broken streams in a row, without an answer between them, after which the fault is taken to be a lasting one


class Reconnect(Settings):
    """How long a client tries."""

    patience: float = Field(600.0, gt=0, description="seconds without the owner after which requests fail")
    first_wait: float = Field(0.1, gt=0, description="seconds before the second try; doubled each time")
    longest_wait: float = Field(10.0, gt=0)
    keepalive: float = Field(KEEPALIVE_SECONDS, ge=0.2, description="seconds of silence before the connection is probed")


class OwnerAway(DeltaloomError):
    """The owner could not be reached for too long; the command may be run again when it is back."""


@dataclass
class Traffic:
    """What a client has sent and received, in bytes of frames, repeats included."""

    up: int = 0
    down: int = 0
    requests: int = 0
    connections: int = 0


@dataclass
class _Pending:
    """A request that is not answered yet, as it was sent. The sizes its reply must have are known from it."""

    request: Any
    frame: bytes
    known: dict[str, int]
    future: Future[Any] = field(default_factory=Future)


class GrpcChannel:
    """A stream to the owner for one purpose of one run; a `messages.Channel`, and the same for messages of joint rounds."""

    def __init__(self, membership: Membership, hello: Hello, reconnect: Reconnect | None = None, *,
                 address: str | None = None) -> None:
        """`address`: another one than the invite's, for instance of a tunnel."""
        contact = membership.contact
        self.party, self.hello = contact.party, hello
        self.traffic = Traffic()
        self._address = address or contact.address
        self._authority, self._credential = membership.authority, membership.credential()
        self._settings = reconnect or Reconnect()
        self._lock = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._next = 1
        self._out: queue.SimpleQueue[bytes | None] | None = None
        self._welcome: Future[Welcome] = Future()
        self._slots: threading.Semaphore | None = None
        self._bounds = GREETING
        self._closing = threading.Event()
        self._progress = False   # whether this stream was welcomed or answered
        self._call: Any = None
        self._failed: DeltaloomError | None = None
        self._thread = threading.Thread(target=self._run, name=f"stream-{hello.purpose}", daemon=True)
        self._thread.start()

    @property
    def welcome(self) -> Welcome:
        """What the owner said first; waits for the first connection.

        Raises:
            Refused: the owner does not let this party in. OwnerAway: it cannot be reached.
        """
        return self._welcome.result()

    @property
    def facts(self) -> BackFacts:
        """The back at the other end; waits for the first connection."""
        return _facts(self.welcome)

    @property
    def window(self) -> int:
        """Requests that may be under way at once; waits for the first connection."""
        return self.welcome.window

    def submit(self, request: Any) -> Future[Any]:
        """Send a request; waits only while `window` requests are under way. Errors of the owner are raised by the future.

        Raises:
            NonFiniteError: the request holds NaN or infinity. RefusedError: the channel is closed.
        """
        _ = self.welcome
        slots = self._slots
        if slots is None or self._closing.is_set():
            raise RefusedError("this channel to the owner is closed")
        slots.acquire()
        try:
            with self._lock:
                id, self._next = self._next, self._next + 1
            frame = encode_message(request, id=id, party=self.party, codec=self.hello.codec)
        except BaseException:
            slots.release()
            raise
        pending = _Pending(request, frame, expected(request, self._bounds))
        pending.future.set_running_or_notify_cancel()   # it will be answered or fail: it cannot be cancelled
        pending.future.add_done_callback(lambda _: slots.release())
        with self._lock:
            if self._failed is None and not self._closing.is_set():
                self._pending[id] = pending
                self.traffic.requests += 1
                if self._out is not None:
                    self._out.put(frame)
                return pending.future
        pending.future.set_exception(self._failed or RefusedError("this channel to the owner is closed"))
        return pending.future

    def close(self) -> None:
        """No further request; those under way fail."""
        self._closing.set()
        with self._lock:
            call, out = self._call, self._out
        if out is not None:
            out.put(None)
        if call is not None:
            call.cancel()
        self._thread.join(timeout=10)
        self._fail(RefusedError("this channel to the owner was closed before the answer came"))

    # The connection's thread.

    def _run(self) -> None:
        wait, away, broken = self._settings.first_wait, time.monotonic(), 0
        while not self._closing.is_set():
            self._progress = False
            error = self._connect()
            if self._closing.is_set():
                return
            if self._progress:
                wait, away, broken = self._settings.first_wait, time.monotonic(), 0
            broken += isinstance(error, Refused) and error.reason in ("truncated", "checksum")
            gone = time.monotonic() - away
            lasting = isinstance(error, Refused) and error.reason not in AGAIN
            if lasting or broken > MOST_BROKEN:
                self._fail(error)
                return
            if gone > self._settings.patience:
                self._fail(OwnerAway("the owner could not be reached", got=str(error)[:300],
                                     legal=f"within {self._settings.patience:g} s",
                                     hint=f"Is it running at {self._address}, and is this party's certificate good?"))
                return
            log("reconnecting", party=self.party, purpose=self.hello.purpose, error=str(error)[:200], wait=round(wait, 2))
            # Parties that lost the same owner do not come back in step.
            self._closing.wait(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, self._settings.longest_wait)

    def _connect(self) -> DeltaloomError:
        """One stream from its beginning to its end; why it ended."""
        out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        out.put(encode_message(self.hello, id=0, party=self.party, codec=self.hello.codec))
        channel = secure_channel(self._address, self._authority, self._credential, self._settings.keepalive)
        try:
            call = channel.stream_stream(STREAM)(self._outgoing(out))
            with self._lock:
                self._call = call
            self.traffic.connections += 1
            return self._receive(call, out)
        except grpc.RpcError as error:
            refusal = told(error)
            if refusal is not None:
                return as_error(Refusal(*refusal))
            return OwnerAway("the connection to the owner broke", got=f"{error.code().name}: {error.details()}"[:300])
        except Refused as refused:
            return refused
        finally:
            with self._lock:
                self._out = self._call = None
            out.put(None)
            channel.close()

    def _outgoing(self, out: queue.SimpleQueue[bytes | None]) -> Iterator[bytes]:
        while (frame := out.get()) is not None:
            yield from chunks(frame)
            self.traffic.up += len(frame)

    def _receive(self, call: Any, out: queue.SimpleQueue[bytes | None]) -> DeltaloomError:
        assembler = Assembler(self._judge, max(self._bounds.most_body, 2 ** 16))
        for chunk in call:
            frame = assembler.feed(chunk)
            if frame is None:
                continue
            self.traffic.down += frame.bytes
            head: Head = frame.header
            message = decode_message(head, frame.body, self._bounds)
            if isinstance(message, Welcome):
                self._greeted(message, out)
                assembler = Assembler(self._judge, self._bounds.most_body)
            elif isinstance(message, Refusal) and head.id == 0:
                return as_error(message)
            else:
                self._answered(head, message)
        assembler.finish()
        return OwnerAway("the owner ended the stream")

    def _judge(self, header: dict[str, Any]) -> tuple[Head, int]:
        id = header.get("id")
        pending = self._pending.get(id) if isinstance(id, int) else None
        bounds = self._bounds if pending is None else self._bounds.expecting(pending.known)
        head = check_header(header, bounds, asks=False)
        return head, head.size

    def _greeted(self, welcome: Welcome, out: queue.SimpleQueue[bytes | None]) -> None:
        facts, limits = _facts(welcome), welcome.limits
        wrong = [name for name in ("tokens", "rows", "values", "session_tokens") if type(limits.get(name)) is not int]
        if wrong:
            raise Refused("schema", "the owner's welcome lacks a limit", got=wrong[0])
        self._bounds = Bounds(width=facts.width, outputs=facts.outputs, positions=facts.max_length, tokens=limits["tokens"],
                              rows=limits["rows"], values=limits["values"], session_tokens=limits["session_tokens"],
                              codecs=frozenset({self.hello.codec}))
        self._progress = not self._pending   # being let in without being answered is no progress
        if not self._welcome.done():
            self._slots = threading.Semaphore(welcome.window)
            self._welcome.set_result(welcome)
        elif _facts(self._welcome.result()) != facts:
            raise Refused("policy", "the owner came back with another model", got=facts.fingerprint[:16])
        with self._lock:
            self._out = out
            for id in sorted(self._pending):
                out.put(self._pending[id].frame)

    def _answered(self, head: Head, message: Any) -> None:
        self._progress = True
        with self._lock:
            pending = self._pending.pop(head.id, None)
        if pending is None:
            return   # a second answer to a request that was sent twice
        if isinstance(message, Refusal):
            pending.future.set_exception(as_error(message))
        elif type(message) is REPLIES.get(type(pending.request), type(message)):
            pending.future.set_result(message)
        else:
            pending.future.set_exception(Refused("schema", "the owner answered with another kind", got=head.kind.name))

    def _fail(self, error: DeltaloomError) -> None:
        with self._lock:
            self._failed = self._failed or error
            pending, self._pending = list(self._pending.values()), {}
        for one in pending:
            one.future.set_exception(error)
        if not self._welcome.done():
            self._welcome.set_exception(error)


def join(membership: Membership, key: bytes, certificate: bytes, *, patience: float = 60.0, address: str | None = None) -> None:
    """Enrol with an invite's credential (or renew with the party's own); the owner's certificate is kept in the folder.

    Raises:
        Refused: the owner says no. OwnerAway: it cannot be reached.
    """
    from deltaloom.private.identity import Credential

    where = address or membership.contact.address
    until, wait = time.monotonic() + patience, 0.1
    while True:
        channel = secure_channel(where, membership.authority, Credential(key, certificate))
        try:
            membership.accept(channel.unary_unary(ENROL)(membership.request(), timeout=max(1.0, until - time.monotonic())))
            return
        except grpc.RpcError as error:
            refusal = told(error)
            if refusal is not None:
                raise as_error(Refusal(*refusal)) from None
            if time.monotonic() > until:
                raise OwnerAway("the owner could not be reached", got=f"{error.code().name}: {error.details()}"[:300],
                                hint=f"Is it running at {where}? Then run the same command again.") from None
        finally:
            channel.close()
        time.sleep(wait)
        wait = min(2 * wait, 5.0)


def _facts(welcome: Welcome) -> BackFacts:
    try:
        return BackFacts(**welcome.facts)
    except TypeError:
        raise Refused("schema", "the owner's welcome lacks facts of its back",
                      got=", ".join(sorted(welcome.facts))[:200]) from None


