"""Factored layers opened for training: each factor a linear layer of its own, so that deltas change the factors themselves.

A delta of the product would have to be cut to the rank again afterwards, and most of what it learned would be lost by that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deltaloom.compact import FactoredLinear
from deltaloom.compact.face import compact_layers, put


class Factors(nn.Module):
    """y = left(right(x)): the two factors of a layer, by the names that they have there."""

    def __init__(self, layer: FactoredLinear) -> None:
        super().__init__()
        with torch.device("meta"):
            self.right = nn.Linear(layer.d_in, layer.rank, bias=False)
            self.left = nn.Linear(layer.rank, layer.d_out, bias=layer.bias is not None)
        self.right.weight, self.left.weight = layer.right, layer.left
        self.left.register_parameter("bias", layer.bias)
        self.transposed = layer.transposed
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The factor that writes the output; models ask the type of it."""
        return self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)"""
        found: Tensor = self.left(self.right(x))
        return found

    def closed(self) -> FactoredLinear:
        """The layer of the factors as they are now."""
        layer = FactoredLinear(self.right.weight, self.left.weight, self.left.bias)
        layer.transposed = self.transposed
        return layer.train(self.training)


@contextmanager
def opened_factors(model: nn.Module) -> Iterator[None]:
    """Within the block every factored layer is a pair of linear layers, `right` and `left`."""
    paths = [path for path, layer in compact_layers(model).items() if isinstance(layer, FactoredLinear)]
    for path in paths:
        layer = model.get_submodule(path)
        if isinstance(layer, FactoredLinear):
            put(model, path, Factors(layer))
    try:
        yield
    finally:
        for path in paths:
            pair = model.get_submodule(path)
            if isinstance(pair, Factors):
                put(model, path, pair.closed())
