"""What a run costs by its shapes alone: floating-point operations; and how fast this machine multiplies."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from deltaloom.sites import Site

REACHED_SHARE = 0.35   # of a plain matmul's rate that short training steps reach on a CPU


def block_linears(sites: Sequence[Site]) -> list[Site]:
    """The linears inside the blocks, fused ones as a whole."""
    return [site for site in sites if site.kind == "linear" and site.part is None and site.layer is not None]


def flops_per_token(sites: Sequence[Site], delta_parameters: int, label_share: float) -> int:
    """Floor of one training step per real token: 4 for each frozen weight (forward 2, gradient of activations 2), 6 for each
    trained one; the language-model head counts at label positions only."""
    inside = sum(site.d_in * site.d_out for site in block_linears(sites))
    head = sum(site.d_in * site.d_out for site in sites if site.kind == "linear" and site.role == "head")
    return int(4 * inside + 4 * head * label_share + 6 * delta_parameters)


def rough_seconds(flops: int, tokens: int, dtype: torch.dtype) -> float:
    """Seconds of training on that many tokens, where nothing can be tried."""
    return flops * tokens / (matmul_rate(dtype) * REACHED_SHARE)


def matmul_rate(dtype: torch.dtype, seconds: float = 0.15) -> float:
    """Floating-point operations per second of a plain matrix product on this machine, measured for a moment."""
    a, b = torch.randn(1024, 512).to(dtype), torch.randn(512, 1024).to(dtype)
    a @ b
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ b
        rounds += 1
    return rounds * 2 * 1024 * 512 * 1024 / (time.perf_counter() - start)
