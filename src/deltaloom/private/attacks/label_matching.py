"""Label matching: whoever owns the last layer reads the label off the gradient.

The loss's gradient by the back's output h is W'(p - y), with p = softmax(W h) and y the label. The owner computed h and owns W,
so it knows W'p, and y is the class v for which W'p - w_v points where the gradient points. Exact; a positive scale of the
gradient (a mean over a batch, a class weight) does not matter.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from deltaloom.private.attacks.base import Gradients, LabelAttack


class LabelMatching(LabelAttack):
    """Cosine between the gradient and what each label would have made of it; needs the head."""

    name: ClassVar[str] = "label-matching"

    def scores(self, seen: Gradients) -> Tensor | None:
        """(n, classes) cosines; None without the head."""
        if seen.head is None:
            return None
        head, gradients = seen.head.double(), seen.gradients.double()
        expected = (seen.outputs.double() @ head.T).softmax(dim=1) @ head
        along = (expected * gradients).sum(1, keepdim=True) - gradients @ head.T
        squares = (expected**2).sum(1, keepdim=True) - 2 * expected @ head.T + (head**2).sum(1)
        length = gradients.norm(dim=1, keepdim=True) * squares.clamp(min=1e-30).sqrt()
        return (along / length.clamp(min=1e-30)).to(torch.float32)
