"""Orthonormal rows: how far blocks of vectors are from them, a step towards them, a penalty with its gradient in closed form.

    G = X X^H - I for each block X (n, d),     R = ||G||^2 or ||G||,     dR/dX = 4 G X or 2 G X / ||G||

A step X <- X - w G X is one of Newton-Schulz's for w = 1/2 (they lead to the nearest orthonormal rows); for smaller w it pulls
more gently. It is applied apart from the optimizer, as decoupled weight decay is: neither loss nor gradients contain it.
Blocks are batched, (B, n, d), real or complex; `valid` (B, n) tells rows from padding, whose entries are zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def deviation(blocks: Tensor, valid: Tensor | None = None) -> Tensor:
    """X X^H - I of each block, (B, n, n); zero for padding."""
    gram = blocks @ blocks.mH
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal.sub_(1 if valid is None else valid.to(diagonal.dtype))
    return gram


@torch.no_grad()
def step_towards(blocks: Tensor, strength: float, valid: Tensor | None = None) -> Tensor:
    """X - strength (X X^H - I) X."""
    return blocks - strength * (deviation(blocks, valid) @ blocks)


@torch.no_grad()
def residual(blocks: Tensor, valid: Tensor | None = None) -> float:
    """The largest ||X X^H - I||_F / sqrt(n) of the blocks; 0 where there are no rows."""
    if not blocks.numel():
        return 0.0
    gaps = deviation(blocks, valid).abs().square().sum((-2, -1))
    counts = blocks.shape[1] if valid is None else valid.sum(-1).clamp_min(1)
    return float((gaps / counts).max().sqrt())


def squared_penalty(blocks: Tensor) -> Tensor:
    """||X X^H - I||_F^2 of each block, (B,); the gradient is formed at once, so that no graph is kept."""
    return _Penalty.apply(blocks, False)


def norm_penalty(blocks: Tensor) -> Tensor:
    """||X X^H - I||_F of each block, (B,); where it is 0 its gradient is 0 too."""
    return _Penalty.apply(blocks, True)


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Tensor, root: bool) -> Tensor:
        gap = deviation(blocks)
        value = gap.abs().square().sum((-2, -1))
        if root:
            value = value.sqrt()
            ctx.gradient = (gap @ blocks) * (2 / value.clamp_min(torch.finfo(value.dtype).tiny))[:, None, None]
        else:
            ctx.gradient = 4 * (gap @ blocks)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient * grads[0][:, None, None], None
