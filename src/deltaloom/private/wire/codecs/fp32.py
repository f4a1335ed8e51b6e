"""fp32: every bit arrives; 4 h bytes a row of h values."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from deltaloom.errors import NonFiniteError
from deltaloom.private.wire.codecs.base import Codec, Shape


class Fp32(Codec):
    """IEEE float32, as it is in memory."""

    name: ClassVar[str] = "fp32"

    def size(self, shape: Shape) -> int:
        """Four bytes a value."""
        return 4 * math.prod(shape)

    def encode(self, tensor: Tensor) -> bytes:
        """The values' own bytes."""
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError("a tensor that should be sent holds NaN or infinity", got=tuple(tensor.shape))
        return tensor.numpy().tobytes()

    def finite(self, raw: memoryview, shape: Shape) -> bool:
        """No value has all bits of its exponent set."""
        return not raw or bool(torch.isfinite(torch.frombuffer(raw, dtype=torch.float32)).all())

    def decode(self, raw: memoryview, shape: Shape) -> Tensor:
        """A copy of the bytes."""
        return torch.frombuffer(raw, dtype=torch.float32).clone().reshape(shape) if raw else torch.empty(shape)
