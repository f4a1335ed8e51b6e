"""The coordinate-wise median; of an even number of values the mean of the two in the middle.

Yin et al. 2018 (arXiv 1803.01498). Counts are not used: a party that lies about its values can lie about its count too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from deltaloom.private.means.base import Mean, Weighed


class Median(Mean):
    """Withstands any minority of parties that send anything at all."""

    name: ClassVar[str] = "median"

    def needed(self) -> int:
        """Three: of two values the median is the mean."""
        return 3

    def combine(self, updates: Sequence[Weighed]) -> dict[str, Tensor]:
        """The middle of each coordinate."""
        low, high = (len(updates) - 1) // 2, len(updates) // 2
        common = {}
        for name in updates[0].tensors:
            values = torch.stack([update.tensors[name] for update in updates]).sort(dim=0).values
            common[name] = (values[low] + values[high]) / 2
        return common
