"""How far a run is, what it knows of its evaluations, and what is due next: plain numbers that a checkpoint keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from deltaloom.errors import SettingsError
from deltaloom.train.feed import Feed
from deltaloom.train.settings import EarlyStop, TrainSettings


@dataclass(frozen=True)
class Goal:
    """The metric that decides which step is best."""

    metric: str
    higher: bool

    def better(self, value: float, than: float | None, by: float = 0.0) -> bool:
        """Whether a value is better by more than `by`; NaN never is, and any number is better than None."""
        if math.isnan(value) or than is None:
            return not math.isnan(value)
        return value > than + by if self.higher else value < than - by


@dataclass
class Progress:
    """Position and records of a run; every field goes into the checkpoint."""

    total_steps: int
    step: int = 0
    epoch: int = 0                 # of the next step
    index: int = 0                 # of the next step within its epoch
    steps_in_epoch: int = 0
    tokens: int = 0
    seconds: float = 0.0
    log_bytes: int = 0
    evaluated_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    best_value: float | None = None
    reference: float | None = None  # what early stopping compares with: the last value that was better by min_delta
    stale: int = 0                  # evaluations since then

    @property
    def epochs(self) -> float:
        """Epochs done, with the part of the current one."""
        return self.epoch + (self.index / self.steps_in_epoch if self.steps_in_epoch else 0.0)

    def due(self, every: int | float | None) -> bool:
        """Whether something that happens every so many steps, share of the run, or (None) epoch is due after this step."""
        if self.step == 0:
            return False
        if self.step >= self.total_steps:
            return True
        if every is None:
            return self.index == self.steps_in_epoch
        period = every if isinstance(every, int) else max(1, round(every * self.total_steps))
        return self.step % period == 0

    def note_metrics(self, metrics: Mapping[str, float], goal: Goal, stop: EarlyStop | None) -> bool:
        """Record an evaluation at the current step; whether it is the best so far.

        Raises:
            SettingsError: the metric that decides is not among them.
        """
        if goal.metric not in metrics:
            raise SettingsError("train.metric names no metric of this task", got=goal.metric, legal=sorted(metrics))
        value = float(metrics[goal.metric])
        self.evaluated_step, self.metrics = self.step, {name: float(number) for name, number in metrics.items()}
        if goal.better(value, self.reference, stop.min_delta if stop else 0.0):
            self.reference, self.stale = value, 0
        else:
            self.stale += 1
        best = goal.better(value, self.best_value)
        if best:
            self.best_step, self.best_value = self.step, value
        return best


def planned_steps(settings: TrainSettings, feed: Feed) -> int | None:
    """The run's optimizer steps; None when only its time is limited."""
    if settings.max_steps is not None:
        return settings.max_steps
    if settings.epoch_limit is None:
        return None
    whole = math.floor(settings.epoch_limit)
    steps = sum(len(feed.steps(epoch)) for epoch in range(whole))
    share = settings.epoch_limit - whole
    return max(1, steps + (round(share * len(feed.steps(whole))) if share else 0))
