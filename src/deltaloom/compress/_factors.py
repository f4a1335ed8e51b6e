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
from deltaloom.errors import RefusedError, listed
from deltaloom.tuned import Tuned
from deltaloom.tuned.adapted import Adapted


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

    def closed(self, kept: dict[int, nn.Parameter]) -> FactoredLinear:
        """The layer of the factors as they are now; `kept` holds those of other layers, which may share them."""
        layer = FactoredLinear(self.right.weight, self.left.weight, self.left.bias)
        layer.right = kept.setdefault(id(self.right.weight), layer.right)
        layer.left = kept.setdefault(id(self.left.weight), layer.left)
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
        kept: dict[int, nn.Parameter] = {}
        for path in paths:
            pair = model.get_submodule(path)
            if isinstance(pair, Factors):
                put(model, path, pair.closed(kept))


def check_shared(tuned: Tuned) -> None:
    """That layers which share a factor would go on sharing it.

    Raises:
        RefusedError: they would be trained apart.
    """
    places: dict[int, list[str]] = {}
    for path, module in tuned.model.named_modules():
        if isinstance(module, Adapted) and isinstance(module.base, nn.Linear):
            places.setdefault(id(module.base.weight), []).append(path)
    trained = {site.path: delta.override().get("weight") for site, delta in tuned.pairs()}
    apart = [paths for paths in places.values() if len(paths) > 1
             and (trained[paths[0]] is None or any(trained[path] is not trained[paths[0]] for path in paths))]
    if apart:
        raise RefusedError("these layers share a factor, and deltas beside it would part them", got=listed(apart[0], 4),
                           hint="Train whole tensors (the default of distil), or heal before sharing.")
