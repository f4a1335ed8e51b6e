"""Full fine-tuning of the chosen layers: trainable tensors take the place of the layer's own.

    y = layer(x) with its weight, bias, ... replaced by trainable copies

On all layers this is full fine-tuning, step for step; on some of them it is layer-wise fine-tuning, and on a new head it is
how heads train. Copies are float32 whatever the storage of the model, so that small updates are not lost in 16 bits (master
weights: Micikevicius et al. 2018, arXiv 1710.03740). Tensors that the model ties stay tied: they share one copy, if the
targets name all the layers concerned; a layer named alone is untied from the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaloom.deltas.base import AttachContext, Attachment, Delta, Method, master_copy
from deltaloom.errors import RefusedError, TargetError
from deltaloom.sites import Kind, Site


class FullDelta(Delta):
    """Trainable tensors of one layer, by their names in the layer; `transposed`: the layer stores its weight as (d_in, d_out)."""

    def __init__(self, tensors: dict[str, nn.Parameter], transposed: bool) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, tensor)
        self.transposed = transposed

    def override(self) -> dict[str, Tensor]:
        """All the tensors."""
        return dict(self.named_parameters(recurse=False))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The tensors themselves."""
        own = {name: tensor.detach().to(weight.dtype) for name, tensor in self.override().items()}
        others = sorted(own.keys() - {"weight", "bias"})
        if others:
            raise RefusedError("these tensors are not a layer's weight and bias", got=", ".join(others),
                               hint="Keep the delta next to the model.")
        new = own.get("weight", weight)
        return new.T if self.transposed and "weight" in own else new, own.get("bias", bias)


class Full(Method):
    """Full fine-tuning of the layers that the targets name."""

    name: ClassVar[str] = "full"
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "embedding", "norm", "tensors")

    targets: str | tuple[str, ...] = "all"
    """Which layers. What the model itself never trains (a fixed position table) stays fixed under `all`."""

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """Copies of each layer's tensors; a tensor that several layers share is copied once.

        Raises:
            TargetError: a part of a fused layer, or a layer that has nothing to train.
        """
        parts = [site.name for site in sites if site.part is not None]
        if parts:
            raise TargetError("a part of a fused layer cannot be replaced on its own", got=parts[0],
                              hint="Name the whole layer.", problems=parts)
        copies: dict[int, nn.Parameter] = {}
        deltas: dict[Site, Delta] = {}
        idle = []
        for site in sites:
            layer = context.layer(site)
            tensors = {name: tensor for name, tensor in layer.named_parameters(recurse=False)
                       if tensor.is_floating_point() and f"{site.path}.{name}" not in context.fixed}
            if not tensors:
                idle.append(site.name)
                continue
            for tensor in tensors.values():
                copies.setdefault(id(tensor), master_copy(tensor))
            own = {name: copies[id(tensor)] for name, tensor in tensors.items()}
            deltas[site] = FullDelta(own, isinstance(layer, (Conv1D, nn.Embedding)))
        if not deltas or (idle and self.targets != "all"):
            raise TargetError("these layers have no tensor that can train", got=len(idle), problems=idle)
        return Attachment(deltas)
