"""LoTR: the matrices of one kind in all layers share two bases, each layer has a small core.

    y = W x + b + alpha / rank * A G (B^T x),     A (d_out, r) and B (d_in, r) for all layers, G (r, r) for each

Reparameterisation-based delta tuning. The matrices of one role and one shape are one tensor, layers by d_out by d_in, in
Tucker form with two bases: q of all layers, v of all layers, and so on; N layers have r (d_out + d_in) + N r^2 parameters.
(In the authors' example query and value share one pair.)
G starts at zero, so nothing changes at birth, and A and B are random and orthonormal. The authors draw A and B from the normal
distribution; orthonormal columns have the same directions, and a length that does not grow with the width of the model.
Bershatsky et al. 2024 (arXiv 2402.01376).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deltaloom.deltas._shared_bases import Bases, CoreDelta, Group, SharedBasesMethod
from deltaloom.deltas.base import AttachContext
from deltaloom.sites import Site


class LoTR(SharedBasesMethod):
    """Low tensor rank adaptation."""

    name: ClassVar[str] = "lotr"

    alpha: float = Field(16.0, gt=0)
    """Numerator of the scale alpha / rank."""

    def groups(self, sites: Sequence[Site]) -> list[Group]:
        """One for each role and shape."""
        found: dict[tuple[str, int, int], dict[Site, tuple[int, int]]] = {}
        for site in sites:
            found.setdefault((site.role, site.d_out, site.d_in), {})[site] = (1, 1)
        return [Group(f"{role}-{d_out}x{d_in}", d_out, d_in, grids) for (role, d_out, d_in), grids in found.items()]

    def bases(self, group: Group, context: AttachContext) -> Bases:
        """A and B orthonormal."""
        down, up = (_orthonormal(width, self.rank, context) for width in (group.d_in, group.d_out))
        return Bases(down.T.contiguous(), up)

    def delta(self, bases: Bases, group: Group, site: Site, context: AttachContext) -> CoreDelta:
        """A core of zeros."""
        return CoreDelta(bases, torch.zeros(1, self.rank, self.rank), 1, self.alpha / self.rank, self.dropout)


def _orthonormal(width: int, rank: int, context: AttachContext) -> Tensor:
    """(width, rank) with orthonormal columns; zeros where saved values come right after."""
    if context.loading:
        return torch.zeros(width, rank)
    return torch.linalg.qr(torch.randn(width, rank, generator=context.generator)).Q.contiguous()
