"""FacT-TK: the changes of all matrices as one tensor in Tucker form, two bases and a core shared by all layers.

    change of slice i = scale * U S_i V^T,     S_i = sum over k of P[i, k] C[:, :, k]

Reparameterisation-based delta tuning. U (d, r), V (d, r) and C (r, r, r) belong to all slices, each slice adds only a row of
P (N, r): N slices of one group have 2 d r + r^3 + N r parameters. The matrices are cut into square slices of one edge d, the
side that most of them have: in BERT and ViT twelve a block, from q, k, v, o and four each from the two layers of the mlp. A
matrix that cannot be cut along one side alone joins a group of its own shape, with its own U, V and C.
Initial values are those of the authors' code: U zero, so that nothing changes at birth, V uniform up to 1 / sqrt(d), C and P
by Xavier's bounds, sqrt(3) / r and sqrt(6 / (r + N)). (The authors write x W: their U is V here.) They drop 0.1 of the r
inner activations, here dropout acts on the layer's input, and is 0 unless asked for.
Jie and Deng 2023 (arXiv 2212.03145).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from deltaloom.deltas._shared_bases import Bases, Group, SharedBasesMethod, square_groups, uniform, with_cores
from deltaloom.deltas.base import AttachContext, LowRankDelta
from deltaloom.sites import Site


class TuckerBases(Bases):
    """The bases of a group and the core C (r, r, r), whose last index is the one of the slices."""

    def __init__(self, down: Tensor, up: Tensor, core: Tensor) -> None:
        super().__init__(down, up)
        self.core = nn.Parameter(core)


class TuckerDelta(LowRankDelta):
    """One site's change: `weights` (slices, r) are its rows of P; all else is the attachment's, which keeps it once."""

    scale: Tensor

    def __init__(self, bases: TuckerBases, weights: Tensor, rows: int, scale: float, dropout: float) -> None:
        super().__init__()
        self._bases = (bases,)  # in a tuple: no submodule, it has its place among the shared modules
        self.weights = nn.Parameter(weights)
        self.rows = rows
        self.register_buffer("scale", torch.full((weights.shape[1],), scale), persistent=False)
        self.dropout = dropout

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """V^T, the constant scale, U, with the slices' cores on the side that is cut."""
        bases = self._bases[0]
        cores = torch.einsum("nk,ijk->nij", self.weights, bases.core)
        down, up = with_cores(bases, cores, self.rows)
        return down, self.scale, up


class FacTTK(SharedBasesMethod):
    """Factor-tuning with a Tucker decomposition."""

    name: ClassVar[str] = "fact-tk"

    scale: float = Field(1.0, gt=0)
    """Factor of every change; the authors choose it for each task, from 0.01 to 100."""

    def groups(self, sites: Sequence[Site]) -> list[Group]:
        """The square slices; other shapes each for themselves."""
        return square_groups(sites)

    def bases(self, group: Group, context: AttachContext) -> TuckerBases:
        """V and C uniform, U zero."""
        down = uniform((self.rank, group.d_in), group.d_in ** -0.5, context)
        core = uniform((self.rank, self.rank, self.rank), 3 ** 0.5 / self.rank, context)
        return TuckerBases(down, torch.zeros(group.d_out, self.rank), core)

    def delta(self, bases: Bases, group: Group, site: Site, context: AttachContext) -> TuckerDelta:
        """A row of P for each slice of the matrix."""
        if not isinstance(bases, TuckerBases):  # never: `bases` makes them
            raise TypeError(f"bases without a core: {type(bases).__name__}")
        rows, columns = group.grids[site]
        weights = uniform((rows * columns, self.rank), (6 / (self.rank + group.slices)) ** 0.5, context)
        return TuckerDelta(bases, weights, rows, self.scale, self.dropout)
