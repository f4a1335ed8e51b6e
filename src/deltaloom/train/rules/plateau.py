"""Evaluations bring nothing better: a lower rate."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from deltaloom.train.rules.base import Decision, Lower, Rule, Seen


class Plateau(Rule):
    """Acts where several evaluations in a row are no better than the best one before them."""

    name: ClassVar[str] = "plateau"
    order: ClassVar[int] = 30

    patience: int = Field(2, ge=1, description="evaluations without anything better")
    min_delta: float = Field(0.0, ge=0, description="how much better counts as better")
    factor: float = Field(0.5, gt=0, lt=1, description="of the learning rate")
    times: int = Field(2, ge=1, description="how often to lower it")

    def decide(self, seen: Seen) -> Decision | None:
        """Lower the rate."""
        if seen.acted >= self.times or seen.stale(self.min_delta) < self.patience:
            return None
        return Decision([Lower(self.factor)], f"{seen.goal.metric} has not become better in {self.patience} evaluations")
