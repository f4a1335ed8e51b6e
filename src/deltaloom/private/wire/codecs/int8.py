"""int8: each row is scaled so that its largest value is 127, and rounded to nearest even; h + 4 bytes a row of h values.

value = code * scale with scale = max |row| / 127: the error of a value is at most half its row's scale. The codes hide nothing:
they are a rounding, not a protection.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from deltaloom.errors import NonFiniteError
from deltaloom.private.wire.codecs.base import Codec, Shape

LARGEST = 127.0


class Int8(Codec):
    """All rows' scales (float32), then all rows' codes."""

    name: ClassVar[str] = "int8"

    def size(self, shape: Shape) -> int:
        """A byte a value and four a row."""
        return 4 * _rows(shape) + math.prod(shape)

    def encode(self, tensor: Tensor) -> bytes:
        """Scales and codes."""
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError("a tensor that should be sent holds NaN or infinity", got=tuple(tensor.shape))
        if not tensor.numel():
            return bytes(self.size(tuple(tensor.shape)))
        rows = tensor.reshape(_rows(tuple(tensor.shape)), -1)
        scales = rows.abs().amax(dim=1) / LARGEST
        # A row of zeros, or one so small that its scale underflows, travels as zeros.
        divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
        codes = torch.round(rows / divisors[:, None]).clamp_(-LARGEST, LARGEST).to(torch.int8)
        return scales.numpy().tobytes() + codes.numpy().tobytes()

    def finite(self, raw: memoryview, shape: Shape) -> bool:
        """Scales are finite, not negative, and small enough that no value overflows."""
        count = _rows(shape)
        if not count:
            return True
        scales = torch.frombuffer(raw[:4 * count], dtype=torch.float32)
        limit = torch.finfo(torch.float32).max / 128
        return bool(((scales >= 0) & (scales <= limit)).all())

    def decode(self, raw: memoryview, shape: Shape) -> Tensor:
        """code * scale."""
        count = _rows(shape)
        if not math.prod(shape):
            return torch.empty(shape)
        scales = torch.frombuffer(raw[:4 * count], dtype=torch.float32)
        codes = torch.frombuffer(raw[4 * count:], dtype=torch.int8).reshape(count, -1)
        return (codes.to(torch.float32) * scales[:, None]).reshape(shape)


def _rows(shape: Shape) -> int:
    return math.prod(shape[:-1]) if shape else 1
