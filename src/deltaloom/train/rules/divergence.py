"""The training loss goes up again: back to the best evaluation, with a lower rate."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from deltaloom.train.rules.base import Decision, Lower, Restore, Rule, Seen, Stop


class Divergence(Rule):
    """Acts where the mean training loss since the last evaluation is above its lowest so far by a share of the first one."""

    name: ClassVar[str] = "divergence"
    order: ClassVar[int] = 10

    above: float = Field(0.5, gt=0, description="share of the first loss that the loss may be above its lowest")
    factor: float = Field(0.3, gt=0, lt=1, description="of the learning rate after going back")
    times: int = Field(2, ge=1, description="how often to go back; the next time training stops with the best delta")

    def decide(self, seen: Seen) -> Decision | None:
        """Go back and slower, or stop if that did not help."""
        if len(seen.losses) < 2:
            return None
        now, lowest, first = seen.losses[-1], min(seen.losses[:-1]), seen.losses[0]
        if math.isfinite(now) and now <= lowest + self.above * abs(first):
            return None
        return self._back(seen, f"the training loss is {now:.4g}, its lowest was {lowest:.4g} and its first {first:.4g}")

    def failed(self, seen: Seen, message: str) -> Decision | None:
        """A loss or gradient that is not finite is a divergence too; without a best evaluation there is nothing to go back to."""
        return self._back(seen, message) if seen.best() is not None else None

    def _back(self, seen: Seen, reason: str) -> Decision:
        if seen.acted >= self.times:
            return Decision([Stop("diverged")], f"{reason}; going back {self.times} times did not help")
        return Decision([Restore(), Lower(self.factor)], reason)
