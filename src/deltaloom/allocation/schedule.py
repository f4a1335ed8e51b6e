"""When the budget is decided anew, and how large it is: a warm start, a cubic decrease, a frozen end.

    b(t) = b0                                                    t <= start
           bT + (b0 - bT) (1 - (t - start) / (T - start - end))^3     start < t <= T - end
           bT                                                    afterwards

AdaLoRA's schedule as in its code; the numerator in eq. (14) of the paper, t - start - end, would let the budget jump above b0.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltaloom.errors import SettingsError


@dataclass(frozen=True)
class Schedule:
    """Optimizer steps of a run: `total`, of which `start` come before the first decision and `end` after the last one."""

    total: int
    start: int
    end: int
    every: int

    @classmethod
    def of_run(cls, total: int, start: float, end: float, every: int | None) -> Schedule:
        """The schedule of a run of `total` steps; `start` and `end` are shares of it, `every` steps lie between decisions.

        Without `every` it is a two-hundredth of the run, at least 10 steps.

        Raises:
            SettingsError: the run is too short for a decision that has seen a gradient, or for two decisions that far apart.
        """
        first, last = int(total * start + 1e-9), int(total * end + 1e-9)
        steps = total - first - last
        chosen = max(10, total // 200) if every is None else every
        # the last decision looks at the gradients of the steps before it: at step 1 there are none
        if steps < 1 or total - last < 2 or (every is not None and every > steps):
            raise SettingsError("the schedule of ranks is longer than the run",
                                got=f"{total} optimizer steps: {first} before the first decision, {last} after the last, one "
                                    f"every {chosen}", legal=f"every <= {max(steps, 1)}, start + end < 1, and 2 steps up to the "
                                "last decision",
                                hint="Train for more steps, or lower start, end or every.")
        return cls(total, first, last, chosen)

    @property
    def last(self) -> int:
        """The step of the final decision."""
        return self.total - self.end

    def due(self, step: int) -> bool:
        """Whether ranks are decided after this step (steps count from 1)."""
        return step == self.last or (self.start < step < self.last and step % self.every == 0)

    def budget(self, step: int, initial: float, target: float) -> float:
        """What components may cost after this step."""
        if step <= self.start:
            return initial
        if step >= self.last:
            return target
        left = 1 - (step - self.start) / (self.total - self.end - self.start)
        return target + (initial - target) * left ** 3
