"""A frozen affine layer whose weight is the product of two thin factors.

    y = (x right^T) left^T + b,    right (r, d_in), left (d_out, r)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaloom.compact.base import CompactLinear
from deltaloom.errors import RefusedError


class FactoredLinear(CompactLinear):
    """A layer of two factors. They are parameters, so that they can be trained further (after compression, for one)."""

    def __init__(self, right: Tensor, left: Tensor, bias: Tensor | None = None) -> None:
        """The factors are kept, not copied: a parameter that is given stays the one that other layers have too.

        Raises:
            RefusedError: their shapes or types do not fit one another, or the bias them.
        """
        if right.ndim != 2 or left.ndim != 2 or left.shape[1] != right.shape[0] or left.dtype != right.dtype \
                or not right.is_floating_point():
            raise RefusedError("two factors that do not make a matrix", legal="left (d_out, r), right (r, d_in) of one type",
                               got=f"left {tuple(left.shape)} {left.dtype}, right {tuple(right.shape)} {right.dtype}")
        if bias is not None and bias.shape != (left.shape[0],):
            raise RefusedError("the bias does not fit the factors", got=tuple(bias.shape), legal=(left.shape[0],))
        super().__init__(right.shape[1], left.shape[0], bias, right.dtype)
        self.right = right if isinstance(right, nn.Parameter) else nn.Parameter(right.detach(), requires_grad=False)
        self.left = left if isinstance(left, nn.Parameter) else nn.Parameter(left.detach(), requires_grad=False)

    @property
    def rank(self) -> int:
        """r"""
        return int(self.right.shape[0])

    def dequantised(self, dtype: torch.dtype | None = None) -> Tensor:
        """left right, computed in float32 at least and rounded once."""
        dtype = dtype or self.dtype
        wide = torch.promote_types(dtype, torch.float32)
        return (self.left.detach().to(wide) @ self.right.detach().to(wide)).to(dtype)

    def multiplied(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Factor by factor."""
        low = functional.linear(x, self.right.to(x.dtype))
        return functional.linear(low, self.left.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def product_transposed(self, g: Tensor) -> Tensor:
        """g (..., d_out) -> (..., d_in)"""
        return (g @ self.left.to(g.dtype)) @ self.right.to(g.dtype)

    def replaced(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """As of every compact layer; the factors' own gradients flow too, where they train."""
        if weight is None:
            return self.multiplied(x, self.bias if bias is None else bias)
        return super().replaced(x, weight, bias)

    def form(self) -> dict[str, Any]:
        """The rank."""
        return {"form": "factored", "d_in": self.d_in, "d_out": self.d_out, "bias": self.bias is not None,
                "transposed": self.transposed, "rank": self.rank}

    def again(self, weight: Tensor, bias: Tensor | None) -> FactoredLinear:
        """The nearest weight of the same rank: its largest singular values."""
        u, s, v = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
        root = s[:self.rank].sqrt()
        right, left = (root[:, None] * v[:self.rank]).to(self.dtype), (u[:, :self.rank] * root).to(self.dtype)
        made = FactoredLinear(right, left, bias)
        made.transposed = self.transposed
        return made.train(self.training)

    def elements(self) -> int:
        """Numbers of the two factors: there is no dense weight that they stand for."""
        return self.rank * (self.d_in + self.d_out)
