"""Noise that the other side can neither predict nor average away.

Drawn from SHAKE-256 over a secret key, the place (step, kind) and a digest of the very tensor it is added to:
- the key is the party's, so nobody else can draw it (torch's and NumPy's generators can be predicted from their output);
- a repeat of the same tensor at the same place gets the same noise: a resent frame tells nothing new, and a run that is
  resumed goes on bit for bit;
- another tensor at the same place gets independent noise: the difference of two frames never shows the difference of
  what they protect.
Samples are float64; that a double has gaps (Mironov 2012) is not defended against.
"""

from __future__ import annotations

import hashlib
import secrets

import numpy as np
import torch
from torch import Tensor

from deltaloom.errors import SettingsError

KEY_BYTES = 32


def new_key() -> bytes:
    """A fresh secret from the operating system."""
    return secrets.token_bytes(KEY_BYTES)


class Noise:
    """Independent draws for one tensor at one place; `layer` tells several guards of one chain apart."""

    def __init__(self, key: bytes, place: str, layer: int, x: Tensor) -> None:
        if len(key) != KEY_BYTES:
            raise SettingsError("the noise key has the wrong length", got=len(key), legal=f"{KEY_BYTES} bytes")
        plain = x.detach().contiguous().cpu()
        body = hashlib.sha256(plain.view(torch.uint8).numpy().data if plain.numel() else b"").digest()
        shape = f"{layer}|{plain.dtype}|{tuple(plain.shape)}|{len(place.encode())}|{place}".encode()
        self._seed = key + hashlib.sha256(shape).digest() + body
        self._drawn = 0

    def uniform(self, count: int) -> np.ndarray:
        """`count` numbers in the open interval (0, 1), 53 bits each."""
        stream = hashlib.shake_256(self._seed + self._drawn.to_bytes(8, "big")).digest(8 * count)
        self._drawn += 1
        return ((np.frombuffer(stream, "<u8") >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def normal(self, count: int) -> np.ndarray:
        """`count` standard normal numbers, by Box & Muller 1958."""
        half = (count + 1) // 2
        radius = np.sqrt(-2.0 * np.log(self.uniform(half)))
        angle = 2.0 * np.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
