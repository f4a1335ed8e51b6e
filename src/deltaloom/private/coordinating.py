"""The coordinator behind a wire: requests of `round_messages` to the state machine, on the disk before anyone is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from deltaloom.private.guards.base import Answer
from deltaloom.private.messages import DoneReply
from deltaloom.private.round_messages import (
    AnswerReply,
    AnswerRequest,
    LeaveRequest,
    RoundReply,
    RoundRequest,
    StandReply,
    StandRequest,
)
from deltaloom.private.rounds import Coordinator, Happened


class DurableRounds:
    """A `round_messages.Coordinating`: one request at a time, saved, then answered.

    A full disk is told to the party that asked, who asks again; what it sent is then known and saved once more.
    """

    def __init__(self, coordinator: Coordinator, path: Path, *, clock: Callable[[], float] = time.monotonic,
                 tell: Callable[[Happened], None] = lambda happened: None) -> None:
        """`path`: the checkpoint, gone on with if it exists. `tell`: what happened, for audit and logs; called when it is saved.

        Raises:
            CheckpointError: the checkpoint is of other rounds or damaged.
        """
        self.coordinator = coordinator
        self._path, self._clock, self._tell = path, clock, tell
        self._lock = threading.Lock()
        self._unsaved: list[Happened] = []
        self._joined: frozenset[str] | None = None  # members as saved
        if path.exists():
            coordinator.restore(path)

    def answer(self, party: str, request: RoundRequest) -> RoundReply:
        """The reply to one request of an authenticated party.

        Raises:
            RefusedError, DataError: as `Coordinator.submit`. ResourceError: the disk is full.
        """
        with self._lock:
            if isinstance(request, AnswerRequest):
                return self._answered(party, request)
            if isinstance(request, LeaveRequest):
                self._keep(*self.coordinator.leave(party, self._clock()))
                return DoneReply()
            return self._stand(party, request)

    def tick(self) -> None:
        """Time passes; to be called now and then, so that a deadline is seen although nobody asks."""
        with self._lock:
            self._keep(*self.coordinator.tick(self._clock()))

    def _answered(self, party: str, request: AnswerRequest) -> AnswerReply:
        receipt = self.coordinator.submit(party, request.phase, Answer(request.values, request.count), self._clock())
        self._keep(*receipt.happened)
        return AnswerReply(receipt.status)

    def _stand(self, party: str, request: StandRequest) -> StandReply:
        now, machine = self._clock(), self.coordinator
        self._keep(*(machine.join(party, now) if request.join else machine.tick(now)))
        told = machine.told(party)
        common = dict(machine.common) if machine.version > request.have else None
        return StandReply(told.ticket, told.label, told.wanted, told.done, machine.seconds_left(), told.told, common)

    def _keep(self, *happened: Happened) -> None:
        self._unsaved += happened
        members = frozenset(self.coordinator.members)
        if not self._unsaved and members == self._joined:
            return
        self.coordinator.save(self._path)
        self._joined = members
        told, self._unsaved = self._unsaved, []
        for each in told:
            self._tell(each)
