"""BitFit: only biases train.

    y = W x + (b + c),     c trainable and zero at first

Specification-based delta tuning. Ben Zaken et al. 2022 (arXiv 2106.10199). By default every linear layer and norm that has
a bias gets an increment c. A model without any bias (Llama) gets new ones at the linear layers inside its blocks. The head
is left alone: the task trains it whole, and a language model's shares its weights with the embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaloom.deltas._peft import modules_ending, whole_sites
from deltaloom.deltas.base import AttachContext, Attachment, Components, Delta, Method, PeftPart, PeftReading, layer_indices
from deltaloom.errors import CheckpointError, RefusedError
from deltaloom.sites import Kind, Site, all_sites, find_sites

PEFT_FIELD = "bias"
PEFT_NAMES = (".base_layer.bias", ".bias")  # the first in layers that PEFT's own method has wrapped


class BitFitDelta(Delta):
    """An increment (d_out,) of one bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y plus the increment."""
        return y + self.bias.to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The bias with the increment; a new bias if the layer has none."""
        increment = self.bias.detach().to(weight.dtype)
        return weight, increment if bias is None else bias + increment


class BitFit(Method):
    """Trainable biases."""

    name: ClassVar[str] = "bitfit"
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "norm")
    peft_fields: ClassVar[tuple[str, ...]] = (PEFT_FIELD,)
    offers: ClassVar[Mapping[str, Any] | None] = {}

    targets: str | tuple[str, ...] = "all"
    """Which layers, among those that can carry a bias (see `new`)."""
    new: bool | None = None
    """Whether linear layers inside the blocks that have no bias get one; by default only in a model without any bias."""

    def sites(self, model: nn.Module) -> list[Site]:
        """The linear layers and norms that have a bias or may get one; never the head."""
        new = self.new
        if new is None:
            new = not any(site.has_bias for site in all_sites(model) if site.kind in self.kinds and site.role != "head")

        def keep(site: Site) -> bool:
            return site.role != "head" and (site.has_bias or (bool(new) and site.kind == "linear" and site.layer is not None))

        return find_sites(model, self.targets, self.kinds, layer_indices(self.layers), keep)

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """One increment for each bias."""
        return Attachment({site: BitFitDelta(site.d_out) for site in sites})

    def components(self, delta: Delta) -> Components:
        """The whole increment is one."""
        return Components({"bias": None}, "bias")

    def to_peft(self, attachment: Attachment, model: nn.Module) -> PeftPart:
        """The `bias` of PEFT's LoRA, which holds the biases themselves."""
        tensors = {}
        for site, delta in attachment.deltas.items():
            bias = model.get_submodule(site.path).bias
            if not isinstance(delta, BitFitDelta) or not isinstance(bias, Tensor) or site.part is not None:
                raise RefusedError("PEFT trains whole biases that the model has, no new ones and no parts", got=site.name,
                                   hint="Keep the native format.")
            tensors[site.path + PEFT_NAMES[1]] = bias.detach().float() + delta.bias.detach()
        return PeftPart({PEFT_FIELD: "all"}, tensors)

    @classmethod
    def from_peft(cls, adapter: PeftPart, model: nn.Module) -> PeftReading | None:
        """The biases beside PEFT's LoRA, as increments."""
        saved = {}
        for suffix in reversed(PEFT_NAMES):
            for name, tensor in adapter.tensors.items():
                path = name.removesuffix(suffix)
                if path != name and not path.endswith(".base_layer"):
                    saved[path] = (name, tensor)
        roots = modules_ending(model, adapter.config.get("modules_to_save"))
        saved = {path: found for path, found in saved.items() if not any(f"{path}.".startswith(f"{root}.") for root in roots)}
        sites = whole_sites(model, cls, saved)
        state = {}
        for path, (name, tensor) in saved.items():
            bias = model.get_submodule(path).bias
            if not isinstance(bias, Tensor) or bias.shape != tensor.shape:
                raise CheckpointError("a bias of the adapter does not fit this model", got=f"{name} {tuple(tensor.shape)}")
            state[sites[path].name] = {"bias": tensor.float() - bias.detach().float().cpu()}
        return PeftReading(cls(targets=tuple(saved) or "all"), state, frozenset(name for name, _ in saved.values()))
