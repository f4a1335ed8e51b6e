"""GPTQ: rounding a weight column by column, each column's error made up for by those that are still to be rounded.

    w_j -> q_j;    w_F -= (w_j - q_j) / [H_F^-1]_jj * [H_F^-1]_jF    over the columns F not yet rounded, H = the inputs' Gram

All the inverses [H_F^-1]_jF are the rows of one upper Cholesky factor of H^-1, divided by its diagonal, and columns go in
blocks whose updates of the rest are one product.

Source: Frantar et al., "GPTQ: Accurate post-training quantization for generative pre-trained transformers" (ICLR 2023).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from deltaloom.compact.codecs.int4 import LARGEST, Int4
from deltaloom.errors import NonFiniteError
from deltaloom.linalg.matrix import ridged

BLOCK = 128  # columns whose errors are carried to the rest at once
MOST_DAMPING = 1e3
Order = Literal["natural", "energy"]


@torch.no_grad()
def rounded(weight: Tensor, gram: Tensor, codec: Int4, damping: float, order: Order) -> tuple[Tensor, Tensor, Tensor]:
    """codes (d_out, d_in), scales and zero points (d_out, groups) for a weight (d_out, d_in) and its inputs' Gram matrix.

    In natural order a group's grid is that of its columns when their turn comes, errors of earlier ones included; by energy
    (the inputs' largest squares first) a group's columns come at different times, and its grid is that of the weight.
    """
    w = weight.detach().double().clone()
    d_out, d_in = w.shape
    places = torch.arange(d_in, device=w.device)
    grids: list[tuple[Tensor, Tensor] | None] = [None] * codec.groups(d_in)
    if order == "energy":
        places = gram.diagonal().argsort(descending=True, stable=True)
        grids = [codec.grid(part) for part in w.split(codec.group, 1)]
    upper = inverse_factor(gram[places][:, places], damping)
    w = w[:, places]
    codes = torch.empty_like(w)
    for start in range(0, d_in, BLOCK):
        stop = min(start + BLOCK, d_in)
        errors = torch.empty(d_out, stop - start, dtype=w.dtype, device=w.device)
        for column in range(start, stop):
            group = int(places[column]) // codec.group
            grid = grids[group]
            if grid is None:
                grid = grids[group] = _grid_now(w, upper, errors, codec, start, column)
            scale, zero = (each.double()[:, 0] for each in grid)
            safe = torch.where(scale > 0, scale, torch.ones_like(scale))
            code = ((w[:, column] / safe).round() + zero).clamp(0, LARGEST)
            code = torch.where(scale > 0, code, zero)
            codes[:, column] = code
            error = (w[:, column] - scale * (code - zero)) / upper[column, column]
            w[:, column:stop] -= error[:, None] * upper[column, column:stop]
            errors[:, column - start] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    back = torch.empty_like(codes)
    back[:, places] = codes
    found = [grid for grid in grids if grid is not None]
    return back, torch.cat([scale for scale, _ in found], 1), torch.cat([zero for _, zero in found], 1)


def _grid_now(w: Tensor, upper: Tensor, errors: Tensor, codec: Int4, start: int, column: int) -> tuple[Tensor, Tensor]:
    """The grid of the group that begins at a column, with the errors that its columns behind this block have yet to get."""
    stop = min(start + BLOCK, w.shape[1])
    end = min(column + codec.group, w.shape[1])
    ahead = w[:, column:end].clone()
    if end > stop:
        ahead[:, stop - column:] -= errors[:, :column - start] @ upper[start:column, stop:end]
    return codec.grid(ahead)


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """U upper triangular with U^T U = H^-1, H the Gram matrix with `damping` times its mean diagonal on the diagonal; float64.

    Inputs that never occur get 1 on the diagonal first: their columns are rounded for themselves. The damping is raised
    tenfold as long as rounding leaves the matrix no Cholesky factor.

    Raises:
        NonFiniteError: entries so large that no damping helps.
    """
    h = gram.detach().double().clone()
    h.diagonal()[h.diagonal() == 0] = 1.0
    while damping <= MOST_DAMPING:
        lower, failed = torch.linalg.cholesky_ex(ridged(h, damping))
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return upper
        damping = max(10 * damping, 1e-8)
    raise NonFiniteError("the Gram matrix of a layer's inputs has no inverse, however damped",
                         got=f"a diagonal of {float(h.diagonal().min()):.3g} to {float(h.diagonal().max()):.3g}")
