"""Updates as integers modulo 2^64, so that masks cancel exactly and a sum does not depend on the order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from deltaloom.errors import RefusedError

BITS = 62  # of a sum; one for the sign, one to spare


def encode(tensors: Mapping[str, Tensor], count: int, fraction: int, parties: int) -> np.ndarray:
    """count x value of all tensors, by name in order, with `fraction` binary digits after the point; then count itself.

    Raises:
        RefusedError: a value is so large that the sum of all parties could wrap around; it names the tensor.
    """
    parts = []
    for name in sorted(tensors):
        scaled = tensors[name].detach().cpu().double().flatten() * count * 2.0**fraction
        largest = float(scaled.abs().max()) if scaled.numel() else 0.0
        if not largest < 2.0**BITS / parties:  # also when it is not finite
            most = 2.0**BITS / parties / count / 2.0**fraction
            raise RefusedError(f"'{name}' has values too large to be masked", got=float(tensors[name].abs().max()),
                               legal=f"below {most:.3g} with {count} samples", hint="Use fewer fraction bits, or no masks.")
        parts.append(scaled.round().to(torch.int64).numpy())
    parts.append(np.array([count], np.int64))
    return np.concatenate(parts).view(np.uint64)


def decode(total: np.ndarray, layout: Mapping[str, tuple[int, ...]], fraction: int) -> tuple[dict[str, Tensor], int]:
    """(the weighted mean of what was encoded and added up, float64; the sum of counts)."""
    signed = total.view(np.int64)
    count = int(signed[-1])
    mean, start = {}, 0
    for name in sorted(layout):
        size = math.prod(layout[name])
        values = signed[start:start + size].astype(np.float64) / 2.0**fraction / max(count, 1)
        mean[name] = torch.from_numpy(values).view(layout[name])
        start += size
    return mean, count


def length_of(layout: Mapping[str, tuple[int, ...]]) -> int:
    """Integers that `encode` makes for tensors of these shapes."""
    return sum(math.prod(shape) for shape in layout.values()) + 1


def mask(seed: bytes, length: int) -> np.ndarray:
    """Uniform integers that follow from a seed."""
    return np.frombuffer(hashlib.shake_256(b"mask" + seed).digest(8 * length), "<u8").astype(np.uint64)
