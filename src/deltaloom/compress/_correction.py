"""What the low-rank corrections of quantised layers share: the target layers, the untouched weights, the new layer."""

from __future__ import annotations

from abc import ABC
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaloom.compact import QuantisedLinear
from deltaloom.compact.face import affine_weight
from deltaloom.compress._layers import OnlyBlocks, TargetLayers, dense_layer, put_layer, whole_in_block
from deltaloom.compress._rounding import quantised_record
from deltaloom.compress.base import Compressor, Work
from deltaloom.errors import RefusedError
from deltaloom.linalg.matrix import best_of_rank, ridged
from deltaloom.sites import Site, find_sites


class Correction(Compressor, ABC):
    """A product left (d_out, rank) right (rank, d_in) beside each quantised weight."""

    targets: TargetLayers = "all-linear"
    layers: OnlyBlocks = None
    rank: int = Field(16, ge=1, description="of the correction")

    def sites(self, model: PreTrainedModel) -> list[Site]:
        """The target layers, all of them quantised and none corrected yet.

        Raises:
            TargetError: targets that match nothing. RefusedError: layers that this does not fit, or a rank as large as one.
        """
        found = find_sites(model, self.targets, ("linear",), self.layers, keep=whole_in_block)
        problems = []
        for site in found:
            layer = model.get_submodule(site.path)
            if not isinstance(layer, QuantisedLinear):
                problems.append(f"{site.path}: is not quantised")
            elif layer.correction:
                problems.append(f"{site.path}: has a correction already, of rank {layer.correction}")
            elif self.rank >= min(site.d_in, site.d_out):
                problems.append(f"{site.path}: a rank of {self.rank} is no low rank of {site.d_out} x {site.d_in}")
        if problems:
            more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
            raise RefusedError("layers whose quantisation error cannot be corrected", problems=[*problems[:8], *more],
                               hint="Put a step that quantises these layers before this one.")
        return found

    def sketch(self, model: PreTrainedModel) -> None:
        """Quantised layers with empty corrections."""
        for site in self.sites(model):
            old = quantised_layer(model, site.path)
            put_layer(model, site.path, QuantisedLinear(old.d_in, old.d_out, old.codec, bias=old.bias, correction=self.rank,
                                                        dtype=old.dtype))

    def untouched(self, work: Work, sites: list[Site]) -> dict[str, Tensor]:
        """The weights (d_out, d_in) of the untouched model.

        Raises:
            RefusedError: nothing says how to load it, or it has other layers (units were removed, blocks dropped).
        """
        original = work.teacher()
        paths = {path for path, _ in original.named_modules()}
        odd = [site.path for site in sites if site.path not in paths or
               affine_weight(dense_layer(original, site.path)).shape != (site.d_out, site.d_in)]
        if odd:
            raise RefusedError("layers of other shapes than the untouched model's cannot be corrected towards it",
                               problems=odd[:8], hint="Save the pruned model first, then quantise and correct that one.")
        return {site.path: affine_weight(dense_layer(original, site.path)).detach() for site in sites}


@torch.no_grad()
def correct(model: nn.Module, path: str, weight: Tensor, rank: int, gram: Tensor | None = None,
            ridge: float = 0.0) -> dict[str, Any]:
    """Put the corrected layer in the place of the quantised one; the record of it. `weight` is the untouched one."""
    old = quantised_layer(model, path)
    weight = weight.to(old.left.device if old.left is not None else next(old.buffers()).device)
    before = quantised_record(path, weight, old, gram)
    left, right = best_of_rank(weight.double() - old.dequantised(torch.float64), rank,
                               None if gram is None else ridged(gram, ridge))
    tensors = {name: old.get_buffer(name) for name in old.codec.shapes(old.d_out, old.d_in)}
    new = QuantisedLinear.from_tensors(tensors, old.d_in, old.d_out, old.bias, old.codec, old.dtype, (left, right))
    put_layer(model, path, new)
    earlier = {f"{key}_before": value for key, value in before.items() if key.endswith("error")}
    return {**quantised_record(path, weight, new, gram), "rank": rank, **earlier}


def quantised_layer(model: nn.Module, path: str) -> QuantisedLinear:
    """The layer at a path.

    Raises:
        RefusedError: it is not quantised.
    """
    layer = model.get_submodule(path)
    if not isinstance(layer, QuantisedLinear):
        raise RefusedError("not a quantised layer", got=f"{path}: {type(layer).__name__}")
    return layer
