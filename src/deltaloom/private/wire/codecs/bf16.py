"""bf16: the upper half of float32, rounded to nearest even; 2 h bytes a row of h values."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from deltaloom.errors import NonFiniteError
from deltaloom.private.wire.codecs.base import Codec, Shape


class Bf16(Codec):
    """bfloat16: the range of float32 with 8 bits of precision."""

    name: ClassVar[str] = "bf16"

    def size(self, shape: Shape) -> int:
        """Two bytes a value."""
        return 2 * math.prod(shape)

    def encode(self, tensor: Tensor) -> bytes:
        """The rounded values' bytes; values above the largest bfloat16 would become infinite and are refused."""
        small = tensor.to(torch.bfloat16)
        if not bool(torch.isfinite(small).all()):
            raise NonFiniteError("a tensor that should be sent holds NaN, infinity, or values beyond bfloat16",
                                 got=tuple(tensor.shape))
        return small.view(torch.int16).numpy().tobytes()

    def finite(self, raw: memoryview, shape: Shape) -> bool:
        """No value has all bits of its exponent set."""
        return not raw or bool(torch.isfinite(torch.frombuffer(raw, dtype=torch.bfloat16)).all())

    def decode(self, raw: memoryview, shape: Shape) -> Tensor:
        """Widened exactly."""
        return torch.frombuffer(raw, dtype=torch.bfloat16).to(torch.float32).reshape(shape) if raw else torch.empty(shape)
