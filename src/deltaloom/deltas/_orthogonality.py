"""Orthonormal rows: how far blocks of vectors are from them, a step towards them, a penalty with its gradient in closed form.

    G = X X^H - I for each block X (n, d),     R = ||G||^2 or ||G||,     dR/dX = 4 G X or 2 G X / ||G||

A step X <- X - w G X is one of Newton-Schulz's for w = 1/2 (they lead to the nearest orthonormal rows); for smaller w it pulls
more gently. It is applied apart from the optimizer, as decoupled weight decay is: neither loss nor gradients contain it.
Blocks are batched, (B, n, d), real or complex; `valid` (B, n) tells rows from padding, whose entries are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    return _Squared.apply(blocks)


def sum_of_penalties(matrices: Sequence[Tensor], root: bool) -> Tensor:
    """The sum of ||X X^H - I||_F^2, or with `root` of its root, over matrices of any sizes, those of one size at once.

    As `squared_penalty`; a root that is 0 has the gradient 0.
    """
    return _PenaltySum.apply(root, *matrices)


def _value_and_gradient(blocks: Tensor, root: bool) -> tuple[Tensor, Tensor]:
    gap = deviation(blocks)
    value = gap.abs().square().sum((-2, -1))
    if not root:
        return value, 4 * (gap @ blocks)
    value = value.sqrt()
    return value, (gap @ blocks) * (2 / value.clamp_min(torch.finfo(value.dtype).tiny))[:, None, None]


class _PenaltySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, root: bool, *matrices: Tensor) -> Tensor:
        alike: dict[torch.Size, list[int]] = {}
        for index, matrix in enumerate(matrices):
            alike.setdefault(matrix.shape, []).append(index)
        values = []
        ctx.gradients, ctx.count = [], len(matrices)
        for places in alike.values():
            value, gradient = _value_and_gradient(torch.stack([matrices[index] for index in places]), root)
            values.append(value.sum())
            ctx.gradients.append((places, gradient))
        return torch.stack(values).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * ctx.count
        for places, gradient in ctx.gradients:
            for index, part in zip(places, (gradient * grads[0]).unbind(), strict=True):
                found[index] = part
        return None, *found


class _Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Tensor) -> Tensor:
        value, ctx.gradient = _value_and_gradient(blocks, False)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return ctx.gradient * grads[0][:, None, None]
