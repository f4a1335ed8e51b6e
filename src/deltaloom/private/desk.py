"""The owner's desk: what becomes of a whole frame, whatever wire it came by. One way for every request:

    frame -> may this party? -> checked message -> a repeat? -> executor or coordinator -> audit, metrics -> the reply's frame
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from deltaloom.errors import DeltaloomError, RefusedError, ResourceError, UsageError
from deltaloom.private.audit import Audit
from deltaloom.private.journal import log
from deltaloom.private.leftovers import Leftovers
from deltaloom.private.messages import Answering, BusyError, CloseRequest, ForgottenError, OpenRequest
from deltaloom.private.metrics import Metrics
from deltaloom.private.policy import Policy
from deltaloom.private.refused import Refused
from deltaloom.private.replies import Replies
from deltaloom.private.round_messages import Coordinating
from deltaloom.private.usage import Usage
from deltaloom.private.wire.convert import Hello, Prepared, Refusal, Welcome, decode_message, prepare
from deltaloom.private.wire.frame import Frame
from deltaloom.private.wire.schema import Bounds, Head

ROUNDS = frozenset({"stand", "answer", "leave"})
SESSIONS = frozenset({"open", "extend", "close"})
STEPS = frozenset({"loss", "outputs", "gradient", "gradient-again"})   # kinds whose steps only grow on a stream
MOST_MESSAGE = 2000
REASONS_OF: dict[type[DeltaloomError], str] = {ForgottenError: "forgotten", BusyError: "busy", RefusedError: "refused",
                                               UsageError: "refused", ResourceError: "resources"}


@dataclass
class Visit:
    """One stream of a party: who, what for, and how far its training steps have come."""

    party: str
    hello: Hello
    newest: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def check_step(self, head: Head) -> bool:
        """Whether the request's step is not over; a later step closes those before it."""
        if head.kind.name not in STEPS or not head.fields.get("keep", True):
            return True
        with self.lock:
            newest = self.newest.get(head.kind.name, 0)
            self.newest[head.kind.name] = max(newest, head.step)
        return head.step >= newest


class Desk:
    """Answers frames of parties."""

    def __init__(self, executor: Answering, policy: Policy, audit: Audit, metrics: Metrics, usage: Usage,
                 coordinator: Coordinating | None = None) -> None:
        self.executor, self.coordinator = executor, coordinator
        self.policy, self.audit, self.metrics, self.usage = policy, audit, metrics, usage
        self.leftovers = Leftovers()
        self._replies: Replies[Prepared] = Replies(4 * policy.limits.in_flight)

    @property
    def bounds(self) -> Bounds:
        """What the schema allows here."""
        facts, limits = self.executor.facts, self.policy.limits
        return Bounds(width=facts.width, outputs=facts.outputs, positions=facts.max_length, tokens=limits.tokens_per_frame,
                      rows=limits.rows_per_frame, values=limits.update_values, session_tokens=limits.session_tokens,
                      codecs=frozenset(self.policy.codecs))

    def welcome(self, party: str, hello: Hello) -> Welcome:
        """The answer to a stream's first frame.

        Raises:
            Refused: the policy does not allow what it announces, or it is for another model.
        """
        facts = self.executor.facts
        self.policy.admit(cut=hello.cut, method=hello.method, codec=hello.codec, labels=hello.labels, guards=hello.guards)
        if hello.fingerprint not in ("", facts.fingerprint):
            raise Refused("policy", "the party's front belongs to another model", got=hello.fingerprint[:16],
                          legal=facts.fingerprint[:16], hint="Get the owner's emulator and front again.")
        if hello.purpose == "rounds" and self.coordinator is None:
            raise Refused("policy", "this owner holds no joint rounds", hint="`deltaloom owner serve` with --rounds.")
        head = self.audit.write(party, "connected", run=hello.run, purpose=hello.purpose, codec=hello.codec, labels=hello.labels,
                                method=hello.method, guards="+".join(hello.guards)[:200])
        limits = self.policy.limits
        sizes = {"tokens": limits.tokens_per_frame, "rows": limits.rows_per_frame, "values": limits.update_values,
                 "session_tokens": limits.session_tokens, "rounds": int(self.coordinator is not None)}
        window = 1 if hello.purpose == "rounds" else limits.in_flight
        return Welcome(asdict(facts), window, sizes, f"{head.lines}:{head.hash}")

    def answer(self, visit: Visit, frame: Frame) -> bytes:
        """The frame of the reply, or of the refusal, to one request; never raises for what a party did.

        Raises:
            ResourceError: the disk is full: this party's stream has to end, and it will come again.
        """
        head: Head = frame.header
        began = time.perf_counter()
        self.metrics.began()
        repeat = False
        try:
            reply, repeat = self._reply(visit, frame)
            data, outcome = reply.frame(id=head.id, party=visit.party), "repeat" if repeat else "answered"
        except ResourceError:
            self.metrics.abandoned()
            raise
        except Exception as error:  # whatever it was: this party is told, the others are served
            refusal = refusal_of(error)
            data, outcome = prepare(refusal, "fp32").frame(id=head.id, party=visit.party), refusal.reason
            self.metrics.refused(refusal.reason)
            level = logging.ERROR if refusal.reason == "failed" else logging.INFO
            log("refused", level=level, party=visit.party, kind=head.kind.name, step=head.step, micro=head.micro,
                reason=refusal.reason, error=type(error).__name__)
        seconds = time.perf_counter() - began
        tokens = head.tokens if outcome == "answered" else 0
        self.metrics.answered(visit.party, head.kind.name, up=frame.bytes, down=len(data), seconds=seconds, repeat=repeat)
        self.usage.add(visit.party, tokens, frame.bytes, len(data))
        self.audit.write(visit.party, head.kind.name, run=visit.hello.run, step=head.step, micro=head.micro, tokens=tokens,
                         up=frame.bytes, down=len(data), ms=round(1000 * seconds, 1), outcome=outcome)
        return data

    def _reply(self, visit: Visit, frame: Frame) -> tuple[Prepared, bool]:
        head: Head = frame.header
        if head.party != visit.party:
            raise Refused("party", "a frame speaks for somebody else", got=head.party, legal=visit.party)
        check_place(head.kind.name, visit.hello.purpose)
        self.usage.check(visit.party, self.policy.quotas, tokens=head.tokens, up=frame.bytes)
        codec = visit.hello.codec
        # Sessions and rounds know their repeats themselves: theirs change something at the owner.
        if head.kind.name in SESSIONS | ROUNDS:
            return self._computed(visit.party, head, frame.body, codec, visit.hello.run), False
        key = (visit.hello.run, codec, head.kind.name, head.fields.get("keep", True), head.step, head.micro)
        digest = digest_of(head, frame.body)
        if not visit.check_step(head) and not self._replies.known(visit.party, key, digest):
            newest = visit.newest[head.kind.name]
            raise Refused("late", "a request for a step that is over", got=head.step, legal=f"at least {newest}")
        return self._replies.answer(visit.party, key, digest, lambda: self._computed(visit.party, head, frame.body, codec),
                                    self.policy.limits.request_seconds)

    def _computed(self, party: str, head: Head, body: memoryview, codec: str, run: str = "") -> Prepared:
        message = decode_message(head, body, self.bounds)
        if isinstance(message, OpenRequest):
            for session in self.leftovers.take(party, run):
                self.executor.answer(party, CloseRequest(session))
            self.leftovers.opened(party, run, message.session)
        elif isinstance(message, CloseRequest):
            self.leftovers.closed(party, run, message.session)
        if head.kind.name in ROUNDS and self.coordinator is not None:
            return prepare(self.coordinator.answer(party, message), codec)
        return prepare(self.executor.answer(party, message), codec)


def check_place(kind: str, purpose: str) -> None:
    """Whether a kind of request belongs on a stream of this purpose.

    Raises:
        Refused: it does not.
    """
    if (kind in ROUNDS) != (purpose == "rounds") or (kind in SESSIONS and purpose != "inference") or kind == "hello":
        raise Refused("order", f"a request '{kind}' cannot come on this stream now", got=purpose)


def digest_of(head: Head, body: memoryview) -> bytes:
    """What tells two requests with the same key apart."""
    tensors = [(one.name, one.codec, one.dtype, one.shape) for one in head.tensors.values()]
    return hashlib.blake2b(body, digest_size=24, key=hashlib.sha256(repr((head.fields, tensors)).encode()).digest()).digest()


def refusal_of(error: BaseException) -> Refusal:
    """What a party is told of an error; of an unforeseen one only its kind."""
    if isinstance(error, Refused):
        return Refusal(error.reason, str(error)[:MOST_MESSAGE])
    for kind, reason in REASONS_OF.items():
        if isinstance(error, kind):
            return Refusal(reason, str(error)[:MOST_MESSAGE])
    if isinstance(error, TimeoutError):
        return Refusal("deadline", "The owner took longer than it may.")
    known = isinstance(error, DeltaloomError)
    return Refusal("failed", str(error)[:MOST_MESSAGE] if known else f"{type(error).__name__} at the owner; its log has more.")


def as_error(refusal: Refusal) -> DeltaloomError:
    """What a party raises for a refusal."""
    kinds: dict[str, Any] = {"forgotten": ForgottenError, "busy": BusyError, "refused": RefusedError}
    kind = kinds.get(refusal.reason)
    return kind(refusal.message) if kind else Refused(refusal.reason, refusal.message)
