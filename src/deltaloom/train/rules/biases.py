"""The target is not met and ranks are as high as they may be: biases train too."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from deltaloom.deltas.base import Method
from deltaloom.deltas.bitfit import BitFit
from deltaloom.train.rules.base import Decision, Release, Rule, Seen


class Biases(Rule):
    """Biases wait from the start, frozen at zero change; they are removed again if they are never needed."""

    name: ClassVar[str] = "biases"
    order: ClassVar[int] = 50
    needs_target: ClassVar[bool] = True

    patience: int = Field(2, ge=1, description="evaluations without anything better")
    min_delta: float = Field(1e-3, ge=0, description="how much better counts as better")

    def decide(self, seen: Seen) -> Decision | None:
        """Unfreeze them, once."""
        if seen.acted or seen.met() or seen.stale(self.min_delta) < self.patience:
            return None
        return Decision([Release()], f"{seen.goal.metric} has stayed at {seen.values[-1]:.4g}, the target is {seen.target:g}")

    def waiting(self) -> tuple[Method, ...]:
        """All biases."""
        return (BitFit(),)
