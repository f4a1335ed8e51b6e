"""8 bits a weight, one scale for each row.

    W[i, j] ~ s[i] q[i, j],    s[i] = max_j |W[i, j]| / 127,    q = round(W / s)

The error of a weight is at most s[i] / 2: nearly without loss, and the cheapest to decode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from deltaloom.compact.codecs.base import CHUNK, Codec, Shapes, checked_weight

LARGEST = 127


class Int8(Codec):
    """int8 codes (d_out, d_in) and a float32 scale for each row."""

    name: ClassVar[str] = "int8"

    def shapes(self, d_out: int, d_in: int) -> Shapes:
        """codes and scales."""
        return {"codes": ((d_out, d_in), torch.int8), "scales": ((d_out, 1), torch.float32)}

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Each row by its own largest value; a row of zeros has scale 0."""
        weight = checked_weight(weight)
        scales = weight.abs().amax(1, keepdim=True).float() / LARGEST
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        inverse = torch.where(scales > 0, 1 / scales, 0.0).nan_to_num(posinf=0.0)
        for rows in _chunks(*weight.shape):
            codes[rows] = (weight[rows].float() * inverse[rows]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
        return {"codes": codes, "scales": scales}

    def decode(self, tensors: Mapping[str, Tensor], d_out: int, d_in: int, dtype: torch.dtype) -> Tensor:
        """codes times scales."""
        codes, scales = tensors["codes"], tensors["scales"]
        weight = torch.empty(d_out, d_in, dtype=dtype, device=codes.device)
        for rows in _chunks(d_out, d_in):
            weight[rows] = torch.mul(codes[rows], scales[rows])
        return weight


def _chunks(d_out: int, d_in: int) -> list[slice]:
    rows = max(1, CHUNK // d_in)
    return [slice(start, start + rows) for start in range(0, d_out, rows)]
