"""Random numbers that are the same on every machine and in every version: for what is kept as a seed instead of as numbers.

The bits are those of numpy's Philox4x64-10 (Salmon et al. 2011), a counter-based generator whose stream numpy keeps the same for
all versions, taken raw. All that is made of them here is whole-number arithmetic or a single correctly rounded step, so that no
library of functions has a say: normal numbers are sums of twelve uniform ones (Irwin-Hall), not logarithms and cosines.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

UNIFORMS = 12          # of 16 bits each: their sum has a variance of one
CENTRE = UNIFORMS * 65535 // 2
CHUNK = 1 << 20        # numbers made at once


class Draws:
    """One stream of random numbers; `seed` and `stream`, each below 2^64, name it."""

    def __init__(self, seed: int, stream: int = 0) -> None:
        self._bits = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64))

    def words(self, count: int) -> np.ndarray:
        """(count,) uint64: the raw stream."""
        return self._bits.random_raw(count)

    def signs(self, count: int) -> Tensor:
        """(count,) int8: -1 or 1, from the top bit of a word each."""
        return torch.from_numpy(1 - 2 * (self.words(count) >> np.uint64(63)).astype(np.int8))

    def permutations(self, count: int, size: int) -> Tensor:
        """(count, size) int64: each row an order of 0 ... size - 1, from sorting a word each."""
        return torch.from_numpy(np.argsort(self.words(count * size).reshape(count, size), axis=1, kind="stable"))

    def integers(self, count: int, below: int) -> Tensor:
        """(count,) int64 from 0 to below - 1: a word modulo `below`, even to 2^-40 for any size of memory."""
        return torch.from_numpy((self.words(count) % np.uint64(below)).astype(np.int64))

    def uniforms(self, count: int) -> Tensor:
        """(count,) float64 in [0, 1): the top 24 bits of a word each, which float32 holds exactly."""
        return torch.from_numpy((self.words(count) >> np.uint64(40)).astype(np.float64) * 2.0 ** -24)

    def normals(self, count: int) -> Tensor:
        """(count,) float64 of mean 0 and deviation 1, at most 6 in size: whole numbers over 65536."""
        found = np.empty(count)
        for start in range(0, count, CHUNK):
            stop = min(start + CHUNK, count)
            pieces = self.words(3 * (stop - start)).astype("<u8").view("<u2").reshape(stop - start, UNIFORMS)
            found[start:stop] = (pieces.sum(1, dtype=np.int64) - CENTRE) * 2.0 ** -16
        return torch.from_numpy(found)
