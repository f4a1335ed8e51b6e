"""NF4 with double quantisation: 4 bits a weight, in blocks of 64 that share a scale, which is quantised itself.

    W[k] ~ level[q[k]] a[block of k],    a = largest |W| of the block
    a[m] ~ map[c[m]] t[group of m] + mean(a),    t = largest |a - mean(a)| of 256 blocks

The 16 levels are quantiles of the normal distribution, scaled to [-1, 1], with an exact zero. 4.13 bits a weight. Dettmers et
al. 2023, QLoRA (arXiv 2305.14314); the map of 256 values is the dynamic tree of Dettmers 2016 (arXiv 1511.04561), as in
bitsandbytes, whose codes and values these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from deltaloom.compact.codecs.base import CHUNK, Codec, Shapes, checked_weight, looked_up, packed, pair_table

BLOCK, GROUP = 64, 256
FEW = 16  # so many comparisons of all values are faster than a search for each
LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
          -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
          0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


class Nf4(Codec):
    """4-bit codes two to a byte, row after row; 8-bit scales of blocks of 64; their scales and mean in float32."""

    name: ClassVar[str] = "nf4"

    def shapes(self, d_out: int, d_in: int) -> Shapes:
        """codes; scales of the blocks, steps of the scales, and their mean."""
        size = d_out * d_in
        blocks = -(size // -BLOCK)
        return {"codes": ((-(size // -2),), torch.uint8), "scales": ((blocks,), torch.uint8),
                "steps": ((-(blocks // -GROUP),), torch.float32), "mean": ((1,), torch.float32)}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Nearest levels; the last block may be short."""
        flat = checked_weight(weight).reshape(-1)
        levels = torch.tensor(LEVELS, device=flat.device)
        codes, largest = [], []
        for part in flat.split(CHUNK):
            found, scale = _nearest(part, levels, BLOCK)
            codes.append(packed(functional.pad(found, (0, found.numel() % 2), value=LEVELS.index(0.0))))
            largest.append(scale)
        scales = torch.cat(largest)
        mean = scales.mean().reshape(1)
        small, steps = _nearest(scales - mean, dynamic_map(flat.device), GROUP)
        return {"codes": torch.cat(codes), "scales": small, "steps": steps, "mean": mean}

    def decode(self, tensors: Mapping[str, Tensor], d_out: int, d_in: int, dtype: torch.dtype) -> Tensor:
        """Levels times the scales of their blocks."""
        codes, size = tensors["codes"], d_out * d_in
        scales = _scales(tensors)
        table = _pairs(codes.device)
        weight = torch.empty(size, dtype=dtype, device=codes.device)
        for start in range(0, size, CHUNK):
            stop = min(size, start + CHUNK)
            values = looked_up(table, codes[start // 2:-(stop // -2)])[:stop - start]
            whole = values.numel() // BLOCK * BLOCK
            first, last = start // BLOCK, start // BLOCK + whole // BLOCK
            values[:whole].view(-1, BLOCK).mul_(scales[first:last, None])
            if whole < values.numel():
                values[whole:].mul_(scales[last])
            weight[start:stop] = values
        return weight.view(d_out, d_in)


def _scales(tensors: Mapping[str, Tensor]) -> Tensor:
    """The scales (blocks,) in float32."""
    codes, steps = tensors["scales"], tensors["steps"]
    values = dynamic_map(codes.device).index_select(0, codes.int())
    return values.mul_(steps.repeat_interleave(GROUP)[:values.numel()]).add_(tensors["mean"])


def _nearest(values: Tensor, levels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(indices (n,) of the levels nearest to values (n,) over the largest size in their block, these sizes (blocks,))."""
    values = values.float()
    blocks = functional.pad(values, (0, -values.numel() % block)).view(-1, block)
    largest = blocks.abs().amax(1)
    scaled = (blocks * (1 / largest.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    scaled = scaled.view(-1)[:values.numel()]
    middles = (levels[:-1] + levels[1:]) / 2
    if len(middles) > FEW:
        return torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8), largest
    found = torch.zeros(scaled.shape, dtype=torch.uint8, device=values.device)
    above = torch.empty(scaled.shape, dtype=torch.bool, device=values.device)
    for middle in middles:
        found += torch.gt(scaled, middle, out=above)
    return found, largest


@cache
def _pairs(device: torch.device) -> Tensor:
    return pair_table(torch.tensor(LEVELS, device=device))


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """The 256 values, sorted: for each power of ten from 1e-6 to 1 the middles of 1, 2, ..., 64 equal parts of [0.1, 1] of it,
    with both signs; besides 0 and 1."""
    found = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2 ** power + 1)
        middles = (10.0 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        found += middles + [-middle for middle in middles]
    return torch.tensor(sorted(found), device=device)
