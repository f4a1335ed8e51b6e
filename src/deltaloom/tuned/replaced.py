"""What stands in for a layer's own tensors: overrides, with increments added; the same sums for running and for merging."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.modeling_layers import GradientCheckpointingLayer

from deltaloom.compact.face import run_replaced
from deltaloom.deltas.base import Delta
from deltaloom.errors import RefusedError, did_you_mean
from deltaloom.sites import Site, stack_stored

CHECKPOINT = "_gradient_checkpointing_func"  # by this name transformers gives each layer its way to checkpoint


def adds(delta: Delta) -> bool:
    """Whether a delta's class has increments at all: a look at the class, no computation."""
    return type(delta).increments is not Delta.increments


def with_increments(path: str, own: Mapping[str, Tensor], replaced: Mapping[str, Tensor], items: Sequence[tuple[Site, Delta]],
                    dtype: Callable[[Tensor], torch.dtype] | None = None) -> dict[str, Tensor]:
    """`replaced`, and every tensor of the layer that the deltas add to, with their increments added in order.

    Sums are in the wider of the two types and at least in float32, or in what `dtype` says for the layer's tensor.

    Raises:
        RefusedError: the layer does not have the tensor, or not in floating point; or the increment's shape does not fit it.
    """
    found = dict(replaced)
    for site, delta in items:
        if not adds(delta):
            continue
        for name, increment in delta.increments().items():
            tensor = found.get(name, own.get(name))
            if tensor is None or not tensor.is_floating_point():
                reason = "has no such tensor" if tensor is None else f"stores it as {tensor.dtype}"
                raise RefusedError(f"a {type(delta).__name__} cannot add to a tensor of this layer: it {reason}",
                                   got=f"{path}.{name}", legal=[key for key, own_tensor in own.items()
                                                                if own_tensor.is_floating_point()] or "none",
                                   hint=did_you_mean(name, own))
            placed = _placed(site, name, increment, tensor, type(delta).__name__)
            wide = torch.promote_types(torch.promote_types(tensor.dtype, increment.dtype), torch.float32)
            wide = wide if dtype is None else dtype(tensor)
            found[name] = tensor.to(wide) + placed.to(wide)
    return found


def call_replaced(layer: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer's output with other tensors in the place of its own.

    A layer that checkpoints itself runs again in backward, when its own tensors are back: there they are replaced again.
    """
    if not (isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing and layer.training):
        return run_replaced(layer, tensors, args, kwargs)
    checkpoint = vars(layer)[CHECKPOINT]
    named = {f"layer.{name}": tensor for name, tensor in tensors.items()}

    def again(function: Callable[..., Any], *inputs: Any) -> Any:
        inner = _Calls(layer, function)
        return checkpoint(lambda *each: functional_call(inner, named, each), *inputs)

    vars(layer)[CHECKPOINT] = again
    try:
        return layer(*args, **kwargs)
    finally:
        vars(layer)[CHECKPOINT] = checkpoint


class _Calls(nn.Module):
    """A function that uses a layer, as a module: `functional_call` takes nothing else."""

    def __init__(self, layer: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = layer
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        """The function's value."""
        return self.function(*inputs)


def _placed(site: Site, name: str, increment: Tensor, tensor: Tensor, kind: str) -> Tensor:
    """An increment in the shape of its tensor."""
    matrices = site.kind == "stack" and name == site.tensor
    legal = (site.slices, site.d_out, site.d_in) if matrices else tuple(tensor.shape)
    if tuple(increment.shape) != legal:
        raise RefusedError(f"the increment of a {kind} does not fit the tensor that it adds to", legal=str(legal),
                           got=f"{tuple(increment.shape)} for {site.path}.{name}")
    return stack_stored(site, increment, tensor.shape) if matrices else increment
