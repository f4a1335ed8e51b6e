"""The fast Walsh-Hadamard transform, and random projections made of it that take a seed instead of a matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaloom.linalg.draws import Draws

SMALLEST_BLOCK = 256  # smaller blocks mix too little: their entries would take few values


def walsh_hadamard(x: Tensor) -> Tensor:
    """H x over the last dimension, whose size n is a power of two; H (n, n) has entries 1 and -1, and H H = n I.

    Sylvester's order: H[i, j] = (-1)^(number of bits that i and j share). Not normalised. Additions alone, in a fixed order, so
    that the bits are the same on every machine; products with small Hadamard matrices would be faster and are not.

    Raises:
        ValueError: the size is no power of two.
    """
    size = x.shape[-1]
    if size < 1 or size & (size - 1):
        raise ValueError(f"the transform takes a power of two, got {size}")
    return _WalshHadamard.apply(x)


def _transform(x: Tensor) -> Tensor:
    size, half = x.shape[-1], 1
    y = x.reshape(-1, size)
    while half < size:
        first, second = y.view(-1, size // (2 * half), 2, half).unbind(2)
        y = torch.stack((first + second, first - second), 2).view(-1, size)
        half *= 2
    return y.view(x.shape)


class _WalshHadamard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _transform(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return walsh_hadamard(grads[0])  # H is its own transpose


class Fastfood(nn.Module):
    """A random matrix P (rows, columns) that a seed decides, whose columns have norm 1 and are nearly orthogonal.

        P = [P_1; P_2; ...],     P_k = H G_k Pi_k H B_k / sqrt(rows * sum G_k^2)

    Blocks of n rows, n the power of two from `columns` on: B_k random signs, Pi_k a permutation, G_k normal numbers, H the
    Walsh-Hadamard transform; z is filled up with zeros, and the last block is cut. On the mean over seeds |P z| = |z|. A product
    takes O(rows log columns) operations. Le, Sarlos and Smola 2013 (Fastfood), who stack blocks like this; the codes of intrinsic
    dimensions use one block as long as all rows, which costs more.

    P z is the same bit for bit on every machine: the numbers come from `Draws`, the arithmetic is additions and single products.
    """

    signs: Tensor
    order: Tensor
    normals: Tensor

    def __init__(self, rows: int, columns: int, seed: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.block = max(SMALLEST_BLOCK, 1 << (columns - 1).bit_length())
        blocks = -(-rows // self.block)
        shape = blocks, self.block
        normals = Draws(seed, 2).normals(blocks * self.block).view(shape)
        squares = (normals * 2.0 ** 16).long().square().sum(1, keepdim=True).double() * 2.0 ** -32  # exact, whatever the order
        self.register_buffer("signs", Draws(seed, 0).signs(blocks * self.block).view(shape), persistent=False)
        self.register_buffer("order", Draws(seed, 1).permutations(*shape), persistent=False)
        self.register_buffer("normals", (normals / (squares * rows).sqrt()).float(), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """P z, (rows,) from (columns,), in float32; without a gradient of its own."""
        x = functional.pad(z.detach().float(), (0, self.block - self.columns)) * self.signs
        mixed = torch.gather(_transform(x), 1, self.order) * self.normals
        return _transform(mixed).reshape(-1)[:self.rows]

    def transposed(self, g: Tensor) -> Tensor:
        """P^T g, (columns,) from (rows,), in float32."""
        filled = functional.pad(g.detach().float(), (0, self.signs.numel() - self.rows)).view_as(self.normals)
        mixed = _transform(filled) * self.normals
        back = _transform(torch.zeros_like(mixed).scatter_(1, self.order, mixed))
        return (back * self.signs).sum(0)[:self.columns]
