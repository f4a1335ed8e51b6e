"""The target is not met and nothing becomes better: higher ranks, from the reserve of growing methods."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from deltaloom.errors import SettingsError
from deltaloom.train.rules.base import Decision, Grow, Rule, Seen


class Growth(Rule):
    """Lets methods with a reserve (adaptive ranks) grow on demand: from `rank` up to `rank` times `reserve`."""

    name: ClassVar[str] = "grow"
    order: ClassVar[int] = 40
    needs_target: ClassVar[bool] = True
    grows: ClassVar[bool] = True

    patience: int = Field(2, ge=1, description="evaluations without anything better")
    min_delta: float = Field(1e-3, ge=0, description="how much better counts as better")
    factor: float = Field(2.0, gt=1, description="how many times as many numbers then act")
    budget: int | None = Field(None, ge=1, description="trained numbers of all deltas at most; null: as far as the reserve goes")

    def decide(self, seen: Seen) -> Decision | None:
        """Grow."""
        if seen.met() or seen.stale(self.min_delta) < self.patience:
            return None
        return Decision([Grow(self.factor, self.budget)],
                        f"{seen.goal.metric} has stayed at {seen.values[-1]:.4g}, the target is {seen.target:g}")

    def check(self, acting: int, reserve: int) -> None:
        """There is a reserve, and the budget is above what acts at the start.

        Raises:
            SettingsError: otherwise.
        """
        if not reserve:
            raise SettingsError("strategy.grow needs a method that can grow", legal="adaptive ranks and a reserve above 1",
                                hint="For example: deltas: [{method: adalora, rank: 1, reserve: 8}]")
        if self.budget is not None and self.budget <= acting:
            raise SettingsError("strategy.grow.budget is spent before the first step", got=self.budget, legal=f"above {acting}",
                                hint="Raise it, or lower the method's rank.")
