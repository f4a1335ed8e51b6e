"""The coordinate-wise trimmed mean.

Of each coordinate the `trim` largest and the `trim` smallest values are left out, the rest is averaged. Yin et al. 2018
(arXiv 1803.01498). Counts are not used: a party that lies about its values can lie about its count too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deltaloom.private.means.base import Mean, Weighed


class Trimmed(Mean):
    """Withstands up to `trim` parties that send anything at all: the result stays within the range of the others' values."""

    name: ClassVar[str] = "trimmed"

    trim: int = Field(default=1, ge=1)
    """Parties left out at either end."""

    def needed(self) -> int:
        """One more than is left out."""
        return 2 * self.trim + 1

    def combine(self, updates: Sequence[Weighed]) -> dict[str, Tensor]:
        """The mean of what is between."""
        kept = slice(self.trim, len(updates) - self.trim)
        return {name: torch.stack([update.tensors[name] for update in updates]).sort(dim=0).values[kept].mean(dim=0)
                for name in updates[0].tensors}
