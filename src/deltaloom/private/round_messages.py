"""What parties and the coordinator of joint rounds tell one another, as plain records; no times, for clocks disagree.

    StandRequest  -> StandReply     take part, and learn where the rounds stand and what is wanted; asked again until it changes
    AnswerRequest -> AnswerReply    what a party answers in a phase of a round: its values, or a step of a mask's exchange
    LeaveRequest  -> DoneReply      nobody waits for this party any longer

A round has one phase, or the phases of a guard that hides single updates. Every request may be repeated: the answer is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from deltaloom.private.messages import DoneReply


@dataclass(frozen=True)
class Phase:
    """What an answer belongs to: phase and attempt of a round, and the version of the common values that it began from."""

    round: int
    attempt: int
    phase: str
    version: int


@dataclass(frozen=True)
class StandRequest:
    """`have`: the version of the common values at hand, -1 for none. `join`: take part from the next round on."""

    have: int = -1
    join: bool = True


@dataclass(frozen=True)
class StandReply:
    """Where the rounds stand for this party.

    label: names run, round and attempt. wanted: this party's answer is waited for. done: no further round. seconds: until the
    deadline of the open phase, by the coordinator's clock. told: for each phase so far what is told to this party. common: the
    common values, if they are newer than those at hand.
    """

    phase: Phase
    label: str
    wanted: bool
    done: bool
    seconds: float | None = None
    told: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    common: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class AnswerRequest:
    """A party's answer to a phase; `count`: rows it used in this round, 0 where a guard hides it. Values: float32 (or its
    halves), int64 or uint8."""

    phase: Phase
    values: Mapping[str, Tensor]
    count: int = 0


@dataclass(frozen=True)
class AnswerReply:
    """The coordinator has it, durably; `late`: it was not used and will not be."""

    status: Literal["accepted", "repeat", "late"]


@dataclass(frozen=True)
class LeaveRequest:
    """This party takes no further part."""


RoundRequest = StandRequest | AnswerRequest | LeaveRequest
RoundReply = StandReply | AnswerReply | DoneReply


class Asked(Protocol):
    """A party's way to the coordinator, whatever carries it."""

    def ask(self, request: RoundRequest) -> RoundReply:
        """The reply to a request, sent again if the connection broke.

        Raises:
            DeltaloomError: what the coordinator refuses, or that it cannot be reached.
        """

    def close(self) -> None:
        """Give the connection back."""


class Coordinating(Protocol):
    """The coordinator behind any wire; may be called from several threads; returns at once, parties ask again."""

    def answer(self, party: str, request: RoundRequest) -> RoundReply:
        """The reply to one request of an authenticated party, whose shapes and sizes the wire has checked.

        Raises:
            DeltaloomError: told to the party as it is.
        """
