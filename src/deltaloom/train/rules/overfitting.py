"""The training loss falls and the evaluation gets worse: stop, with the best delta."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from deltaloom.train.rules.base import Decision, Rule, Seen, Stop


class Overfitting(Rule):
    """Acts where several evaluations in a row are worse than the best one, while the training loss is lower than it was there."""

    name: ClassVar[str] = "overfitting"
    order: ClassVar[int] = 20

    patience: int = Field(3, ge=1, description="evaluations in a row that are worse than the best")

    def decide(self, seen: Seen) -> Decision | None:
        """Stop with the best delta."""
        best = seen.best()
        if best is None or seen.stale() < self.patience or seen.losses[-1] >= seen.losses[best]:
            return None
        if not all(seen.goal.better(seen.values[best], value) for value in seen.values[-self.patience:]):
            return None
        return Decision([Stop("overfitting")], f"{seen.goal.metric} was {seen.values[best]:.4g} at best and is worse in "
                        f"{self.patience} evaluations, while the training loss fell from {seen.losses[best]:.4g} to "
                        f"{seen.losses[-1]:.4g}")
