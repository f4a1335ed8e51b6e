"""Label norms: gradients of rare or hard classes are longer (Li et al. 2021, arXiv 2102.08504)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from deltaloom.private.attacks.base import Gradients, LabelAttack


class LabelNorms(LabelAttack):
    """Distance of the logarithm of the norm to that of the one known sample of each class."""

    name: ClassVar[str] = "label-norms"

    def scores(self, seen: Gradients) -> Tensor | None:
        """(n, classes); None without a known sample of each class."""
        if not seen.known:
            return None
        norms = seen.gradients.float().norm(dim=1).clamp(min=1e-30).log()
        return torch.stack([-(norms - norms[place]).abs() for _, place in sorted(seen.known.items())], dim=1)
