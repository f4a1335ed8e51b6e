"""The contract of a codec: values to bytes and back; the bytes are little-endian on every machine."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

Shape = tuple[int, ...]


class Codec(ABC):
    """How a floating-point tensor travels; a row is its last dimension."""

    name: ClassVar[str]

    @abstractmethod
    def size(self, shape: Shape) -> int:
        """Bytes of a tensor of this shape."""

    @abstractmethod
    def encode(self, tensor: Tensor) -> bytes:
        """The bytes of a finite float32 tensor, contiguous and on the CPU.

        Raises:
            NonFiniteError: it, or what would arrive, holds NaN or infinity.
        """

    @abstractmethod
    def finite(self, raw: memoryview, shape: Shape) -> bool:
        """Whether `size(shape)` bytes stand for finite values alone; makes no tensor of that shape's float32 size."""

    @abstractmethod
    def decode(self, raw: memoryview, shape: Shape) -> Tensor:
        """The float32 tensor of bytes that `finite` accepted; shares no memory with them."""


def require_little_endian() -> None:
    """Refuse machines on which the views below would read wrongly.

    Raises:
        RuntimeError: this machine is big-endian.
    """
    if sys.byteorder != "little":
        raise RuntimeError("the wire's codecs are written for little-endian machines")


require_little_endian()
