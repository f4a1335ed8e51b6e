"""4 bits a weight, on an even grid with a zero point for each group of columns within a row.

    W[i, j] ~ s[i, g] (q[i, j] - z[i, g]),    g = j // group,    q and z in 0 .. 15

The grid of a group spans its smallest and largest value and 0. Calibrated methods (GPTQ) choose other codes on the same grid:
`grid` gives the grid of some columns, `pack` stores codes that were chosen elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from deltaloom.compact.codecs.base import CHUNK, Codec, Shapes, checked_weight, looked_up, packed, pair_table
from deltaloom.errors import RefusedError

LARGEST = 15


class Int4(Codec):
    """4-bit codes two to a byte; a bfloat16 scale and an 8-bit zero point for each group of a row."""

    name: ClassVar[str] = "int4"

    group: int = Field(128, ge=2, le=65536, multiple_of=2, description="columns that share a scale; the last group may be short")

    def groups(self, d_in: int) -> int:
        """Groups of a row."""
        return -(d_in // -self.group)

    def shapes(self, d_out: int, d_in: int) -> Shapes:
        """codes, scales and zero points."""
        groups = self.groups(d_in)
        return {"codes": ((d_out, -(d_in // -2)), torch.uint8), "scales": ((d_out, groups), torch.bfloat16),
                "zeros": ((d_out, groups), torch.uint8)}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Nearest points of each group's own grid."""
        weight = checked_weight(weight)
        found = [self.grid(part) for part in weight.split(self.group, 1)]
        scales, zeros = torch.cat([scale for scale, _ in found], 1), torch.cat([zero for _, zero in found], 1)
        codes = torch.cat([nearest(part, scale, zero) for part, (scale, zero) in zip(weight.split(self.group, 1), found,
                                                                                     strict=True)], 1)
        return self.pack(codes, scales, zeros)

    @staticmethod
    def grid(columns: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, zero point), each (d_out, 1) in float32, of one group's columns (d_out, n).

        The scale is rounded up to bfloat16, as it is stored, so that codes are chosen on the very grid that is decoded.
        """
        values = columns.float()
        low, high = values.amin(1, keepdim=True).clamp(max=0), values.amax(1, keepdim=True).clamp(min=0)
        step = (high - low) / LARGEST
        scale = step.bfloat16().float()
        scale = torch.where(scale < step, (step * (1 + 2 ** -7)).bfloat16().float(), scale)
        zero = torch.where(scale > 0, (-low / scale).round(), 0.0).nan_to_num(posinf=0.0).clamp(0, LARGEST)
        return scale, zero

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for codes (d_out, d_in), scales and zero points (d_out, groups), all of any type.

        Raises:
            RefusedError: the shapes do not fit one another, or codes or zero points are no whole numbers in 0 .. 15.
        """
        legal = (codes.shape[0], self.groups(codes.shape[1]))
        if scales.shape != legal or zeros.shape != legal:
            raise RefusedError("scales and zero points do not fit the codes", got=f"{tuple(scales.shape)}, {tuple(zeros.shape)}",
                               legal=str(legal))
        for name, tensor in (("codes", codes), ("zero points", zeros)):
            if not bool(((tensor >= 0) & (tensor <= LARGEST) & (tensor == tensor.round())).all()):
                raise RefusedError(f"{name} of 4 bits are whole numbers", legal=f"0 .. {LARGEST}")
        padded = functional.pad(codes.to(torch.uint8), (0, codes.shape[1] % 2))
        return {"codes": packed(padded).contiguous(), "scales": scales.to(torch.bfloat16).contiguous(),
                "zeros": zeros.to(torch.uint8).contiguous()}

    def decode(self, tensors: Mapping[str, Tensor], d_out: int, d_in: int, dtype: torch.dtype) -> Tensor:
        """Scales times the distance of the codes from the zero points."""
        codes, scales, zeros = tensors["codes"], tensors["scales"].float(), tensors["zeros"].float()
        table = _pairs(codes.device)
        weight = torch.empty(d_out, d_in, dtype=dtype, device=codes.device)
        rows = max(1, CHUNK // d_in)
        whole = d_in // self.group
        for start in range(0, d_out, rows):
            here = slice(start, start + rows)
            values = looked_up(table, codes[here].reshape(-1)).view(-1, codes.shape[1] * 2)
            body = values[:, :whole * self.group]
            if whole:
                body = body.reshape(-1, whole, self.group).sub_(zeros[here, :whole, None]).mul_(scales[here, :whole, None])
                weight[here, :whole * self.group] = body.flatten(1)
            if whole * self.group < d_in:
                rest = values[:, whole * self.group:d_in]
                weight[here, whole * self.group:] = (rest - zeros[here, -1:]) * scales[here, -1:]
        return weight


def nearest(columns: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The codes (d_out, n) in float32, whole numbers, of columns (d_out, n) on the grid of scale and zero, each (d_out, 1)."""
    codes = (columns.float() * torch.where(scale > 0, 1 / scale, 0.0).nan_to_num(posinf=0.0)).round_().add_(zero)
    return codes.clamp_(0, LARGEST)


@cache
def _pairs(device: torch.device) -> Tensor:
    return pair_table(torch.arange(16, dtype=torch.float32, device=device))
