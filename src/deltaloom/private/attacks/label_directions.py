"""Label directions: gradients of one class point one way, whatever the head is.

With two classes the gradient by the output is (p - y)(w_1 - w_0): its sign is the label. The attacker needs one known label of
each class to name the directions.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from deltaloom.private.attacks.base import Gradients, LabelAttack


class LabelDirections(LabelAttack):
    """Cosine to the gradient of the one known sample of each class."""

    name: ClassVar[str] = "label-directions"

    def scores(self, seen: Gradients) -> Tensor | None:
        """(n, classes) cosines; None without a known sample of each class."""
        if not seen.known:
            return None
        gradients = functional.normalize(seen.gradients.float(), dim=1)
        return torch.stack([gradients @ gradients[place] for _, place in sorted(seen.known.items())], dim=1)
