"""The hot path of every low-rank delta: one autograd function that keeps nothing but the layer's input.

    y = x Wt + b + ((x downT) * scale) upT

Forward and backward contract through the rank, never form up @ down, cast the small factors to the dtype of x instead of x
to theirs, and draw dropout from a seed, so that no mask, no copy of x and no rank-sized tensor waits for the backward pass.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from deltaloom.kernels.dropout import Draw, drawn


@runtime_checkable
class Affine(Protocol):
    """A frozen affine layer behind one face, whatever its class, orientation or storage."""

    d_out: int

    def product(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out), bias included, in the dtype of x."""

    def product_transposed(self, g: Tensor) -> Tensor:
        """g (..., d_out) -> (..., d_in): the gradient of `product` with respect to its input."""


def low_rank_linear(affine: Affine, x: Tensor, down: Tensor, scale: Tensor, up: Tensor, dropout: float = 0.0,
                    rounded: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The frozen layer plus a low-rank product.

    x (..., d_in), down (r, d_in), scale (r,), up (d_out, r); the result is (..., d_out) in the dtype of x. `dropout` is the
    share of x's entries that the low-rank product does not see (0 when not training). `rounded` are down and up in the dtype of
    x, if they are at hand: layers that share factors then share the copies too.
    """
    draw = drawn(x, dropout) if dropout > 0 else None
    device = x.device.type
    if torch.is_autocast_enabled(device):  # what autocast does for a plain linear layer; backward runs without autocast
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        if rounded is not None and rounded[0].dtype != x.dtype:
            rounded = None
        return _LowRankLinear.apply(x, down, scale, up, affine, draw, rounded)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, scale: Tensor, up: Tensor, affine: Affine, draw: Draw | None,
                rounded: tuple[Tensor, Tensor] | None) -> Tensor:
        y = affine.product(x)
        down_x, up_x = rounded or (down.to(x.dtype), up.to(x.dtype))
        rows = _dropped(x, draw).reshape(-1, x.shape[-1])
        y.view(-1, y.shape[-1]).addmm_(scaled(rows @ down_x.T, scale), up_x.T)
        # The small factors in the dtype of x: casting them again costs more than keeping them. Not the factors themselves as
        # well: they may be copies, of rows of a larger matrix.
        same = down.dtype == up.dtype == x.dtype
        ctx.save_for_backward(x, scale, *((down, up) if same else ()))
        ctx.cast = None if same else (down_x, up_x)
        ctx.affine, ctx.draw, ctx.dtypes = affine, draw, (down.dtype, up.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, *own = ctx.saved_tensors
        down_x, up_x = own if ctx.cast is None else ctx.cast
        g = grads[0].reshape(-1, up_x.shape[0])
        rows = _dropped(x, ctx.draw).reshape(-1, x.shape[-1])
        back = g @ up_x                                            # (rows, r)
        needs = ctx.needs_input_grad
        # the product with x is made again: cheaper than keeping it
        low = rows @ down_x.T if needs[2] or needs[3] else None
        grad_scale = (back * low).sum(0, dtype=scale.dtype) if needs[2] and low is not None else None
        grad_up = (g.T @ scaled(low, scale)).to(ctx.dtypes[1]) if needs[3] and low is not None else None
        back = scaled(back, scale)
        grad_down = (back.T @ rows).to(ctx.dtypes[0]) if needs[1] else None
        grad_x = None
        if needs[0]:
            grad_x = ctx.affine.product_transposed(g)
            if ctx.draw is not None:
                grad_x += _dropped((back @ down_x).view_as(x), ctx.draw).reshape(grad_x.shape)
            else:
                grad_x.addmm_(back, down_x)
            grad_x = grad_x.view(x.shape)
        return grad_x, grad_down, grad_scale, grad_up, None, None, None


def scaled(low: Tensor, scale: Tensor) -> Tensor:
    """low (..., r) times scale, which is broadcast over rows, rounded once to the dtype of low."""
    return (low * scale).to(low.dtype)


def _dropped(x: Tensor, draw: Draw | None) -> Tensor:
    """x with some of its entries zeroed and the rest scaled up, the same for the same draw."""
    return x if draw is None else x * draw.multiplier(x)
