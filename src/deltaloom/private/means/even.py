"""The plain mean: every party counts the same.

    common = sum_i x_i / number of parties

Where a round is a share of a pass over each party's rows, a party with more rows takes more steps and has moved further by
itself; weighing it by its rows again would count them twice, and the common values would go where the largest party wants them.
Counted once they go where training with all rows in one place goes (Wang et al. 2020, arXiv 2007.07481: divide a change by its
number of steps, then weigh it by rows; with steps in proportion to rows the two cancel out).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from deltaloom.private.means.base import Mean, Weighed


class Even(Mean):
    """For rounds of train.epochs, whose steps go with each party's rows. A single party that lies can move it anywhere."""

    name: ClassVar[str] = "even"

    def needed(self) -> int:
        """One."""
        return 1

    def combine(self, updates: Sequence[Weighed]) -> dict[str, Tensor]:
        """Sum of values by the number of parties."""
        common = {}
        for name in updates[0].tensors:
            added = updates[0].tensors[name]
            for update in updates[1:]:
                added = added + update.tensors[name]
            common[name] = added / len(updates)
        return common
