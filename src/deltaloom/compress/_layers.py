"""The layers that a compressor of weights works on: the dense affine layers inside the blocks that its targets name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltaloom.compact import CompactLinear
from deltaloom.compact.face import affine_weight, stores_transposed
from deltaloom.errors import RefusedError
from deltaloom.sites import Site, Targets, find_sites


def _some(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if not value:
        raise ValueError("name at least one target")
    return value


# The settings of every compressor of single layers: `targets`, and `layers`.
TargetLayers = Annotated[str | tuple[str, ...], Field(description="the layers of the blocks to compress"), AfterValidator(_some)]
OnlyBlocks = Annotated[tuple[Annotated[int, Field(ge=0)], ...] | None, Field(description="only these blocks")]


def dense_sites(model: PreTrainedModel, targets: Targets, layers: Sequence[int] | None) -> list[Site]:
    """The affine layers inside the blocks that the targets name: whole ones with a dense weight.

    Raises:
        TargetError: targets that match nothing. RefusedError: layers that are compressed already.
    """
    found = find_sites(model, targets, ("linear",), layers, keep=whole_in_block)
    compact = [site.path for site in found if isinstance(model.get_submodule(site.path), CompactLinear)]
    if compact:
        more = [f"and {len(compact) - 8} more"] if len(compact) > 8 else []
        raise RefusedError("these layers are quantised or factored already, so they have no dense weight to compress",
                           problems=[*compact[:8], *more], hint="Start from the untouched model, or leave them out.")
    return found


def whole_in_block(site: Site) -> bool:
    """Whether a site is a whole layer, no part of a fused one, inside a block."""
    return site.layer is not None and site.part is None


def dense_layer(model: nn.Module, path: str) -> nn.Linear | Conv1D:
    """The layer at a path.

    Raises:
        RefusedError: it has no dense weight.
    """
    layer = model.get_submodule(path)
    if not isinstance(layer, nn.Linear | Conv1D):
        raise RefusedError("not a layer with a dense weight", got=f"{path}: {type(layer).__name__}")
    return layer


def put_weight(layer: nn.Linear | Conv1D, weight: Tensor) -> None:
    """Another weight (d_out, d_in) of the same shape, rounded to the layer's type."""
    with torch.no_grad():
        affine_weight(layer).copy_(weight)


def put_layer(model: nn.Module, path: str, new: nn.Module) -> None:
    """Another layer in the place of the one at a path, and wherever else the model uses that same layer."""
    old = model.get_submodule(path)
    if isinstance(new, CompactLinear):
        new.transposed = stores_transposed(old)
    new.train(old.training)
    for module in model.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def by_kind(sites: Sequence[Site], key: Callable[[Site], object] = lambda site: ()) -> list[list[Site]]:
    """Layers of one stack, role and shape (and `key`) together, in the order of the model."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        groups.setdefault((site.stack, site.role, site.d_out, site.d_in, key(site)), []).append(site)
    return list(groups.values())
