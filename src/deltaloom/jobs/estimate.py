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


def matmul_rate(dtype: torch.dtype, seconds: float = 0.15, device: torch.device | None = None) -> float:
    """Floating-point operations per second of a plain matrix product on this machine, measured for a moment.

    On an accelerator (`device`) of a larger one: small products do not fill it.
    """
    size = 4096 if device is not None and device.type == "cuda" else 1024
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((size, size // 2), (size // 2, size)))
    float((a @ b)[0, 0])  # reading a number waits for an accelerator
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        found = a @ b
        if a.device.type != "cpu":
            float(found[0, 0])
        rounds += 1
    return rounds * size ** 3 / (time.perf_counter() - start)
