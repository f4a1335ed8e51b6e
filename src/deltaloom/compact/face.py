"""One face for the frozen layers of a model, dense or compact: nobody else asks how a layer stores its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaloom.compact.base import CompactLinear
from deltaloom.compact.factored import FactoredLinear
from deltaloom.errors import RefusedError, TargetError


def is_affine(layer: nn.Module) -> bool:
    """Whether a layer is an affine map of its input: dense of either orientation, or compact."""
    return isinstance(layer, nn.Linear | Conv1D | CompactLinear)


def stores_transposed(layer: nn.Module) -> bool:
    """Whether a layer's own tensor `weight` is (d_in, d_out); a compact layer's is as in the layer that it stands for."""
    return layer.transposed if isinstance(layer, CompactLinear) else isinstance(layer, Conv1D | nn.Embedding)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is a Conv1D of transformers, or stands for one: what PEFT calls fan_in_fan_out."""
    return is_affine(layer) and stores_transposed(layer)


def affine_shape(layer: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of an affine layer or of embeddings."""
    rows, columns = _weight_of(layer).shape
    return (columns, rows) if stores_transposed(layer) else (rows, columns)


def affine_weight(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of an affine layer or of embeddings as (d_out, d_in), whatever its storage; a view where possible.

    In `dtype`, or in the layer's own type.
    """
    if isinstance(layer, CompactLinear):
        return layer.dequantised(dtype)
    weight = _weight_of(layer)
    weight = weight.T if stores_transposed(layer) else weight
    return weight if dtype is None else weight.to(dtype)


def own_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """A layer's own parameters by name. A compact layer has a `weight` among them: a new tensor, in float32 at least."""
    own: dict[str, Tensor] = dict(layer.named_parameters(recurse=False))
    if not isinstance(layer, CompactLinear):
        return own
    weight = layer.dequantised(torch.promote_types(layer.dtype, torch.float32))
    return {"weight": weight.T if layer.transposed else weight} | ({"bias": own["bias"]} if "bias" in own else {})


def own_types(layer: nn.Module) -> dict[str, torch.dtype]:
    """The types of `own_tensors`, as the layer counts them; nothing is decoded."""
    found = {name: tensor.dtype for name, tensor in layer.named_parameters(recurse=False)}
    return found | {"weight": layer.dtype} if isinstance(layer, CompactLinear) else found


def run_replaced(layer: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer's output with other tensors in the place of its own, by their names there.

    Raises:
        RefusedError: a compact layer has no such tensor.
    """
    if not isinstance(layer, CompactLinear):
        return torch.func.functional_call(layer, dict(tensors), args, kwargs)
    odd = sorted(tensors.keys() - {"weight", "bias"})
    if odd or len(args) != 1 or kwargs:
        raise RefusedError("of a compact layer only weight and bias can be replaced", got=", ".join(odd) or "other arguments")
    weight = tensors.get("weight")
    return layer.replaced(args[0], weight.T if weight is not None and layer.transposed else weight, tensors.get("bias"))


def dense_layer(layer: CompactLinear, weight: Tensor | None = None, bias: Tensor | None = None) -> nn.Linear | Conv1D:
    """The dense layer that a compact one stands for, in its type and frozen: of its own weight, or of another (d_out, d_in)."""
    weight = layer.dequantised() if weight is None else weight.to(layer.dtype)
    bias = layer.bias if bias is None else bias
    dense: nn.Linear | Conv1D
    with torch.device("meta"):
        dense = Conv1D(layer.d_out, layer.d_in) if layer.transposed else nn.Linear(layer.d_in, layer.d_out, bias is not None)
    stored = (weight.T if layer.transposed else weight).contiguous()
    dense.weight = nn.Parameter(stored, requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return dense.train(layer.training)


def swap(model: nn.Module, path: str, layer: CompactLinear) -> None:
    """Put a compact layer in the place of the dense one at a path, of which it takes over orientation, type and mode.

    Raises:
        RefusedError: the shapes differ, or one has a bias and the other none.
    """
    old = model.get_submodule(path)
    if affine_shape(old) != (layer.d_out, layer.d_in) or (old.bias is None) != (layer.bias is None):
        raise RefusedError("a compact layer does not fit the layer that it should stand for",
                           got=f"{layer.d_out} x {layer.d_in}", legal=f"{affine_shape(old)}, {path}")
    layer.transposed = stores_transposed(old)
    put(model, path, layer.train(old.training))


def put(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a module at a path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def compact_layers(model: nn.Module) -> dict[str, CompactLinear]:
    """The compact layers of a model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, CompactLinear)}


def parameter_count(model: nn.Module) -> int:
    """Numbers that a model's weights stand for: parameters, tied ones once, and the weights of compact layers as if dense.

    The two factors of a factored layer count as they are, shared ones once.
    """
    compact = [layer for layer in compact_layers(model).values() if not isinstance(layer, FactoredLinear)]
    hidden = {id(p) for layer in compact for name, p in layer.named_parameters(recurse=False) if name != "bias"}
    plain = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in hidden)
    return plain + sum(layer.elements() for layer in compact)


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, tied ones once, and of everything that stands for the weights of compact layers."""
    compact = compact_layers(model).values()
    buffers = sum(buffer.numel() * buffer.element_size() for layer in compact for buffer in layer.buffers(recurse=False))
    return buffers + sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _weight_of(layer: nn.Module) -> Tensor:
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TargetError(f"{type(layer).__name__} has no dense weight")
    return weight
