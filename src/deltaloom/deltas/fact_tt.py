"""FacT-TT: the changes of all matrices as one tensor in tensor-train form, two bases shared by all layers.

    change of slice i = scale * U S_i V^T,     U (d, r) and V (d, r) for all slices, S_i (r, r) for each

Reparameterisation-based delta tuning. The matrices are cut into square slices of one edge d, the side that most of them have:
in BERT and ViT twelve a block, from q, k, v, o and four each from the two layers of the mlp. A matrix that cannot be cut
along one side alone joins a group of its own shape, with its own U and V; N slices of one group have 2 d r + N r^2 parameters.
A cut matrix keeps the rank r: its slices below one another share V, those side by side share U.
Initial values are those of the authors' code: U zero, so that nothing changes at birth, V and S uniform, with the bounds of a
linear layer: 1 / sqrt(d), and 1 / sqrt(r) or 1 / sqrt(c r) for c slices side by side. (The authors write x W: their U is V
here.) They drop 0.1 of the r inner activations, here dropout acts on the layer's input, and is 0 unless asked for.
Jie and Deng 2023 (arXiv 2212.03145).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from deltaloom.deltas._shared_bases import Bases, CoreDelta, Group, SharedBasesMethod, square_groups, uniform
from deltaloom.deltas.base import AttachContext
from deltaloom.sites import Site


class FacTTT(SharedBasesMethod):
    """Factor-tuning with a tensor train."""

    name: ClassVar[str] = "fact-tt"

    scale: float = Field(1.0, gt=0)
    """Factor of every change; the authors choose it for each task, from 0.01 to 100."""

    def groups(self, sites: Sequence[Site]) -> list[Group]:
        """The square slices; other shapes each for themselves."""
        return square_groups(sites)

    def bases(self, group: Group, context: AttachContext) -> Bases:
        """V uniform, U zero."""
        return Bases(uniform((self.rank, group.d_in), group.d_in ** -0.5, context), torch.zeros(group.d_out, self.rank))

    def delta(self, bases: Bases, group: Group, site: Site, context: AttachContext) -> CoreDelta:
        """A core for each slice of the matrix."""
        rows, columns = group.grids[site]
        core = uniform((rows * columns, self.rank, self.rank), (columns * self.rank) ** -0.5, context)
        return CoreDelta(bases, core, rows, self.scale, self.dropout)
