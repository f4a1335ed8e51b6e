"""Integer tensors on the wire: places, labels, tokens; never negative, each as narrow as its largest value allows."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from deltaloom.errors import RefusedError

WIDTHS = {"u8": 1, "u16": 2, "u32": 4}
_NUMPY = {"u8": "<u1", "u16": "<u2", "u32": "<u4"}


def encode_integers(tensor: Tensor) -> tuple[str, bytes]:
    """The name of the width, and the bytes, of an int64 tensor.

    Raises:
        RefusedError: a negative value, or one of 2^32 or more.
    """
    least, most = (int(tensor.min()), int(tensor.max())) if tensor.numel() else (0, 0)
    if least < 0 or most >= 2 ** 32:
        raise RefusedError("integers that should be sent are out of range", got=least if least < 0 else most,
                           legal="0 to 2^32 - 1")
    width = next(name for name, size in WIDTHS.items() if most < 256 ** size)
    return width, tensor.numpy().astype(_NUMPY[width]).tobytes()


def decode_integers(raw: memoryview, width: str) -> Tensor:
    """The one-dimensional int64 tensor of some bytes."""
    return torch.from_numpy(numpy.frombuffer(raw, dtype=_NUMPY[width]).astype(numpy.int64))
