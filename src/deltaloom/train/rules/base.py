"""The contract of a strategy's rules: what they see after an evaluation, what they may do, and how they say it.

    Seen -> rule -> Decision (actions, reason) -> Hand -> the run

A rule is its settings and one pure function; all that it remembers is in `Seen`, which the checkpoint keeps. An action knows how
to ask the run for one thing, and says what came of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from deltaloom.deltas.base import Method
from deltaloom.settings import Settings
from deltaloom.train.progress import Goal


@dataclass(frozen=True)
class Seen:
    """What a rule knows at an evaluation. Values and losses have one entry for each evaluation, the current one last."""

    goal: Goal
    values: tuple[float, ...]         # of the goal's metric
    losses: tuple[float, ...]         # mean training loss since the evaluation before
    since: int                        # evaluations since a rule last changed the course; this one counts
    acted: int = 0                    # how often the rule that is asked has acted
    target: float | None = None       # what the goal's metric has to reach
    noise: float | None = None        # gradient noise scale, in learned tokens or rows; None where it could not be measured
    batch: float | None = None        # learned tokens or rows of an optimizer step

    def best(self, by: float = 0.0) -> int | None:
        """The evaluation whose value is the best, each by more than `by` better than the best before; None if none is finite."""
        best, found = None, None
        for index, value in enumerate(self.values):
            if self.goal.better(value, best, by):
                best, found = value, index
        return found

    def stale(self, by: float = 0.0) -> int:
        """How many evaluations brought nothing better by more than `by`, counted from the last change of course at most."""
        best = self.best(by)
        return min(len(self.values) if best is None else len(self.values) - 1 - best, self.since)

    def met(self) -> bool:
        """Whether the current value reaches the target."""
        now = self.values[-1]
        return self.target is not None and (now >= self.target if self.goal.higher else now <= self.target)


class Hand(Protocol):
    """What a run lets actions do. Each says what was done, or None where there was nothing to do."""

    def lower(self, factor: float) -> str | None:
        """Multiply the learning rate of all further steps."""

    def restore(self) -> str | None:
        """Put the deltas, controllers and optimizer of the best evaluation back, and go on from there."""

    def grow(self, factor: float, most: int | None) -> str | None:
        """Let up to `factor` times as many numbers of growing methods act, up to `most` trained numbers of all deltas."""

    def release(self) -> str | None:
        """Begin to train what has waited frozen."""

    def stop(self, word: str, restore: bool) -> str | None:
        """End the run before its next step, with the best delta if `restore`."""


class Action(ABC):
    """One thing that a rule wants done; `name` is the event's."""

    name: ClassVar[str]
    at_the_end: ClassVar[bool] = False  # whether it makes sense where no further step follows

    @abstractmethod
    def apply(self, hand: Hand) -> str | None:
        """Do it; what was done, or None."""


@dataclass(frozen=True)
class Lower(Action):
    """A lower learning rate."""

    name: ClassVar[str] = "lower_rate"
    factor: float

    def apply(self, hand: Hand) -> str | None:
        """See `Hand.lower`."""
        return hand.lower(self.factor)


@dataclass(frozen=True)
class Restore(Action):
    """The best delta, and on from there."""

    name: ClassVar[str] = "restore_best"

    def apply(self, hand: Hand) -> str | None:
        """See `Hand.restore`."""
        return hand.restore()


@dataclass(frozen=True)
class Grow(Action):
    """More numbers of the growing methods."""

    name: ClassVar[str] = "grow"
    factor: float
    most: int | None

    def apply(self, hand: Hand) -> str | None:
        """See `Hand.grow`."""
        return hand.grow(self.factor, self.most)


@dataclass(frozen=True)
class Release(Action):
    """What has waited frozen begins to train."""

    name: ClassVar[str] = "unfreeze"

    def apply(self, hand: Hand) -> str | None:
        """See `Hand.release`."""
        return hand.release()


@dataclass(frozen=True)
class Stop(Action):
    """The end of the run; `word` is why, in the run's facts."""

    name: ClassVar[str] = "stop"
    at_the_end: ClassVar[bool] = True
    word: str
    restore: bool = True

    def apply(self, hand: Hand) -> str | None:
        """See `Hand.stop`."""
        return hand.stop(self.word, self.restore)


@dataclass(frozen=True)
class Recommend(Action):
    """Advice for the next run; nothing is changed."""

    name: ClassVar[str] = "recommend"
    at_the_end: ClassVar[bool] = True
    text: str

    def apply(self, hand: Hand) -> str | None:
        """The advice itself."""
        return self.text


@dataclass(frozen=True)
class Decision:
    """Actions, done in order, and the reason that the report gives for them."""

    actions: Sequence[Action]
    reason: str


class Rule(Settings, ABC):
    """One rule: a file of this folder; `name` is the file's name, and a key of the section `strategy`."""

    name: ClassVar[str]
    order: ClassVar[int]                # rules are asked in this order, until one has changed the course
    needs_target: ClassVar[bool] = False  # on only where a target metric is given
    steers: ClassVar[bool] = True       # whether what it does changes the course
    grows: ClassVar[bool] = False       # whether it grows ranks, which then wait for it

    @abstractmethod
    def decide(self, seen: Seen) -> Decision | None:
        """What to do after this evaluation."""

    def failed(self, seen: Seen, message: str) -> Decision | None:
        """What to do after a step that was not finite; None lets the error through. Nothing was evaluated there."""
        return None

    def check(self, acting: int, reserve: int) -> None:
        """Whether a run that starts with so many acting numbers, and so many in reserve, can do what the rule's settings ask.

        Raises:
            SettingsError: it cannot.
        """

    def waiting(self) -> tuple[Method, ...]:
        """Methods that are attached from the start and stay frozen until `Release`."""
        return ()
