"""Dropout whose mask is drawn from a seed: nothing waits for the backward pass, and on a CPU it is several times faster.

torch draws one number for each element from a serial generator; on a CPU this takes longer than a small layer's matrix product.
Here 64 random bits decide four elements: an element is dropped if its 16 bits fall below p. The seed comes from torch's own
generator, so a run is as reproducible as before, and recomputed layers see the same mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVELS = 1 << 15  # steps in which the probability is given: 0.1 becomes 3277/32768, and the scale fits it exactly


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """x with a share p of its entries zeroed and the others scaled up so that the mean stays; x itself when not training."""
    if not training or p <= 0:
        return x
    if p >= 1:
        return x * 0
    if x.device.type != "cpu":  # accelerators draw in parallel
        return torch.nn.functional.dropout(x, p, True)
    return _SeededDropout.apply(x, p, new_seed())


def new_seed() -> int:
    """A seed from torch's global generator."""
    return int(torch.randint(2**62, ()).item())


def multiplier(like: Tensor, p: float, seed: int) -> Tensor:
    """0 or the scale for each entry of `like`, in its shape and dtype; the same for the same seed."""
    if like.device.type != "cpu":
        generator = torch.Generator(device=like.device).manual_seed(seed)
        keep = torch.rand(like.shape, generator=generator, device=like.device) >= p
        return keep.to(like.dtype) / (1.0 - p)
    count = like.numel()
    bits = np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.int16)[:count]
    dropped = round(p * LEVELS)
    # 15 bits as a signed number r in [-16384, 16383]; (limit - 1 - r) >> 15 is -1 (all bits set) where r >= limit, else 0
    bits >>= 1
    np.subtract(np.int16(dropped - LEVELS // 2 - 1), bits, out=bits)
    bits >>= 15
    scale = torch.tensor(LEVELS / (LEVELS - dropped), dtype=torch.bfloat16)
    bits &= np.int16(scale.view(torch.int16).item())
    found = torch.from_numpy(bits).view(torch.bfloat16).view(like.shape)
    if like.dtype == torch.bfloat16:
        return found
    exact = LEVELS / (LEVELS - dropped) / float(scale)  # a bf16 scale is off by up to 0.4%; wider types get the exact one
    return found.to(like.dtype) * exact


class _SeededDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return x * multiplier(x, p, seed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * multiplier(grads[0], ctx.p, ctx.seed), None, None


class SeededDropout(torch.nn.Module):
    """Takes the place of torch.nn.Dropout inside a frozen model while it is trained."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x with dropout, in training mode."""
        return dropout(x, self.p, self.training)
