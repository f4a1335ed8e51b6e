"""The target is met: stop."""

from __future__ import annotations

from typing import ClassVar

from deltaloom.train.rules.base import Decision, Rule, Seen, Stop


class Reached(Rule):
    """Ends the run at the first evaluation that meets the target."""

    name: ClassVar[str] = "target"
    order: ClassVar[int] = 0
    needs_target: ClassVar[bool] = True

    def decide(self, seen: Seen) -> Decision | None:
        """Stop as soon as the target is met."""
        if not seen.met():
            return None
        return Decision([Stop("target_met", restore=False)],
                        f"{seen.goal.metric} is {seen.values[-1]:g}, the target {seen.target:g} is met")
