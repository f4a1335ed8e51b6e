"""The coordinator of joint rounds behind the wire: its state goes to the disk before a reply leaves, and into the audit log.

Killed at any point, it goes on from its file: a party that heard nothing repeats itself, and a repeat changes nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from deltaloom.private.audit import Audit
from deltaloom.private.guards.base import Answer
from deltaloom.private.journal import log
from deltaloom.private.messages import DoneReply
from deltaloom.private.round_messages import (
    AnswerReply,
    AnswerRequest,
    LeaveRequest,
    Phase,
    RoundReply,
    RoundRequest,
    StandReply,
    StandRequest,
)
from deltaloom.private.rounds import Coordinator, Happened, Ticket

SAVE_SECONDS = 5.0   # how much of a phase's elapsed time a kill may forget


class Coordination:
    """A `Coordinating`; safe to use from several threads. An earlier state in `path` is gone on with.

    Raises:
        CheckpointError: the state is damaged, or of other rounds.
    """

    def __init__(self, coordinator: Coordinator, path: Path, audit: Audit, clock: Callable[[], float] = time.monotonic) -> None:
        self._coordinator, self._path, self._audit, self._clock = coordinator, path, audit, clock
        self._lock = threading.Lock()
        self._saved: float | None = None
        if path.exists():
            coordinator.restore(path)

    def answer(self, party: str, request: RoundRequest) -> RoundReply:
        """See `Coordinating`.

        Raises:
            RefusedError, DataError: from the coordinator. ResourceError: the disk is full; the request may be repeated.
        """
        with self._lock:
            now = self._clock()
            if isinstance(request, AnswerRequest):
                return self._submitted(party, request, now)
            if isinstance(request, LeaveRequest):
                self._keep(self._coordinator.leave(party, now), now)
                return DoneReply()
            self._keep(self._coordinator.join(party, now) if request.join else self._coordinator.tick(now), now)
            return self._stand(party, request)

    def _submitted(self, party: str, request: AnswerRequest, now: float) -> AnswerReply:
        phase = request.phase
        ticket = Ticket(phase.round, phase.attempt, phase.phase, phase.version)
        receipt = self._coordinator.submit(party, ticket, Answer(request.values, request.count), now)
        self._keep(receipt.happened, now, party=party, count=request.count)
        return AnswerReply(receipt.status)

    def _stand(self, party: str, request: StandRequest) -> StandReply:
        coordinator = self._coordinator
        told = coordinator.told(party)
        ticket = told.ticket
        common = dict(coordinator.common) if coordinator.version > request.have else None
        return StandReply(Phase(ticket.round, ticket.attempt, ticket.phase, ticket.version), told.label, told.wanted, told.done,
                          coordinator.seconds_left(), told.told, common)

    def _keep(self, happened: Iterable[Happened], now: float, *, party: str = "", count: int = 0) -> None:
        """Save, then note what happened; nothing is told before."""
        happened = tuple(happened)
        if happened or self._saved is None or now - self._saved >= SAVE_SECONDS:
            self._saved = None   # until it is saved: a full disk leaves it so, and the next call saves first
            self._coordinator.save(self._path)
            self._saved = now
        for one in happened:
            facts: dict[str, int | str] = {"round": one.round, "phase": one.phase, "parties": ",".join(one.parties)[:200]}
            if one.parties == (party,):
                facts["count"] = count
            self._audit.note("owner", f"round-{one.what}", facts, durable=one.what == "published")
            log(f"round {one.what}", facts=facts)
