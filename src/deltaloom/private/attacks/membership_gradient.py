"""Membership by gradient: an update points against the gradients of the samples it was made of.

Cosine between the update and a sample's descent direction at the values before it (Nasr et al. 2019, arXiv 1812.00910, use
gradients of a trained network in the same way).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from deltaloom.private.attacks.base import MembershipAttack, Updates


class MembershipGradient(MembershipAttack):
    """Cosine of the update and each sample's descent direction."""

    name: ClassVar[str] = "membership-gradient"

    def scores(self, seen: Updates, samples: Sequence[object]) -> Tensor:
        """Cosines."""
        names = sorted(seen.before)
        update = torch.cat([(seen.after[name] - seen.before[name]).float().flatten() for name in names])
        scores = []
        for sample in samples:
            values = {name: tensor.detach().clone().requires_grad_() for name, tensor in seen.before.items()}
            gradients = torch.autograd.grad(seen.loss(values, sample), [values[name] for name in names])
            flat = torch.cat([gradient.float().flatten() for gradient in gradients])
            scores.append(-(flat @ update) / (flat.norm() * update.norm()).clamp(min=1e-30))
        return torch.stack(scores)
