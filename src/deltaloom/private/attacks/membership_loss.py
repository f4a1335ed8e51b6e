"""Membership by loss: a sample that was trained on lost more loss through the update than others did.

The simplest of the attacks on released prompts and prefixes (Yeom et al. 2018, arXiv 1709.01604), with the values before the
update in the role of the reference model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from deltaloom.private.attacks.base import MembershipAttack, Updates


class MembershipLoss(MembershipAttack):
    """The fall of each sample's loss."""

    name: ClassVar[str] = "membership-loss"

    def scores(self, seen: Updates, samples: Sequence[object]) -> Tensor:
        """Loss before less loss after."""
        with torch.no_grad():
            return torch.stack([(seen.loss(seen.before, sample) - seen.loss(seen.after, sample)).float() for sample in samples])
