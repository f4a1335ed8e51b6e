"""The mean by data volume.

    common = sum_i n_i x_i / sum_i n_i,    n_i: the samples that party i used in THIS round

McMahan et al. 2017 (arXiv 1602.05629).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from deltaloom.private.means.base import Mean, Weighed


class Weighted(Mean):
    """Each party counts by the samples it used in this round. A single party that lies can move it anywhere."""

    name: ClassVar[str] = "weighted"

    def needed(self) -> int:
        """One."""
        return 1

    def combine(self, updates: Sequence[Weighed]) -> dict[str, Tensor]:
        """Sum of counts times values, by the sum of counts."""
        total = sum(update.count for update in updates)
        common = {}
        for name in updates[0].tensors:
            added = updates[0].tensors[name] * updates[0].count
            for update in updates[1:]:
                added = added + update.tensors[name] * update.count
            common[name] = added / total
        return common
