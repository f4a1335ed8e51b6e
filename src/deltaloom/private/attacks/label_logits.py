"""Label logits: where the outputs are logits, their gradient is p - y, and y is read off its sign.

Every coordinate of p - y is positive but that of the label. Exact, for any positive scale; the owner needs to know nothing.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from deltaloom.private.attacks.base import Gradients, LabelAttack


class LabelLogits(LabelAttack):
    """The most negative coordinate of the gradient by logits."""

    name: ClassVar[str] = "label-logits"

    def scores(self, seen: Gradients) -> Tensor | None:
        """(n, classes) the gradient's negative; None where the outputs are no logits."""
        return -seen.gradients.float() if seen.logits else None
