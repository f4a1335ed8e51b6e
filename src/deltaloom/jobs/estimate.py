"""What a run will cost, from shapes alone: floating-point operations, bytes, seconds. Estimates, and called so."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from deltaloom.compact.face import compact_layers
from deltaloom.sites import Site, all_sites

ADAM_BYTES = 16        # fp32 master, gradient and two moments of each trained number
REACHED_SHARE = 0.35   # of a plain matmul's rate that short training steps reach on a CPU


@dataclass(frozen=True)
class Cost:
    """Estimated cost of a run."""

    flops_per_token: int
    memory_bytes: int      # of training, on top of the loaded model
    seconds: float


def block_linears(sites: Sequence[Site]) -> list[Site]:
    """The linears inside the blocks, fused ones as a whole."""
    return [site for site in sites if site.kind == "linear" and site.part is None and site.layer is not None]


def flops_per_token(sites: Sequence[Site], delta_parameters: int, label_share: float) -> int:
    """Floor of one training step per real token: 4 for each frozen weight (forward 2, gradient of activations 2), 6 for each
    trained one; the language-model head counts at label positions only."""
    inside = sum(site.d_in * site.d_out for site in block_linears(sites))
    head = sum(site.d_in * site.d_out for site in sites if site.kind == "linear" and site.role == "head")
    return int(4 * inside + 4 * head * label_share + 6 * delta_parameters)


def activation_bytes(sites: Sequence[Site], dtype: torch.dtype, checkpointing: bool) -> int:
    """Bytes kept for backward per token: inputs and outputs of the linears inside the blocks, or the blocks' inputs alone."""
    size = torch.finfo(dtype).bits // 8
    inside = block_linears(sites)
    if checkpointing:
        blocks = {(site.stack, site.layer): site.d_in for site in inside}
        return size * sum(blocks.values())
    return size * sum(site.d_in + site.d_out for site in inside)


def cost(model: nn.Module, *, dtype: torch.dtype, delta_parameters: int, tokens: int, micro_tokens: int, label_share: float,
         checkpointing: bool) -> Cost:
    """Cost of training on that many tokens in micro-batches of at most `micro_tokens`."""
    sites = all_sites(model)
    flops = flops_per_token(sites, delta_parameters, label_share)
    memory = ADAM_BYTES * delta_parameters + micro_tokens * activation_bytes(sites, dtype, checkpointing)
    memory += max((layer.elements() * dtype.itemsize for layer in compact_layers(model).values()), default=0)  # one is decoded
    seconds = flops * tokens / (matmul_rate(dtype) * REACHED_SHARE)
    return Cost(flops, memory, seconds)


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
