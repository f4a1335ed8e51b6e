"""The target is not met and nothing is left to try: stop, with the best delta."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from deltaloom.train.rules.base import Decision, Rule, Seen, Stop


class GiveUp(Rule):
    """Asked after all others, so that it acts where none of them has anything left to do."""

    name: ClassVar[str] = "give-up"
    order: ClassVar[int] = 90
    needs_target: ClassVar[bool] = True

    patience: int = Field(2, ge=1, description="evaluations without anything better")
    min_delta: float = Field(1e-3, ge=0, description="how much better counts as better")

    def decide(self, seen: Seen) -> Decision | None:
        """Stop with the best delta."""
        best = seen.best()
        if seen.met() or seen.stale(self.min_delta) < self.patience or best is None:
            return None
        return Decision([Stop("target_missed")], f"the target {seen.target:g} is not met: {seen.goal.metric} is "
                        f"{seen.values[best]:.4g} at best, has not become better in {self.patience} evaluations, and nothing is "
                        "left to try")
