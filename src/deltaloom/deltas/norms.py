"""Norm tuning: the weights (and biases) of the norms train, everything else stays.

    y = norm(x) * g + b,     g and b trainable copies of the layer's own

Specification-based delta tuning. Qi et al. 2022 (arXiv 2211.08682) for LayerNorm in language models; Zhao et al. 2023
(2312.11420) for multimodal ones. The copies take the place of the layer's tensors, so a norm that computes with 1 + g
(Gemma) needs no case of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from deltaloom.deltas._peft import PEFT_COMMON, peft_targets, refuse_fields, whole_sites
from deltaloom.deltas.base import AttachContext, Attachment, Delta, Method, PeftPart, PeftReading, master_copy
from deltaloom.errors import CheckpointError
from deltaloom.sites import Kind, Site

PEFT_TYPE = "LN_TUNING"
PEFT_NAME = ".ln_tuning_layers."


class NormDelta(Delta):
    """Trainable copies of one norm's weight and bias."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = master_copy(weight)
        self.bias = None if bias is None else master_copy(bias)

    def override(self) -> dict[str, Tensor]:
        """The copies in place of the layer's own."""
        return {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The copies."""
        return self.weight.detach().to(weight.dtype), bias if self.bias is None else self.bias.detach().to(weight.dtype)


class Norms(Method):
    """Trainable norms."""

    name: ClassVar[str] = "norms"
    kinds: ClassVar[tuple[Kind, ...]] = ("norm",)
    peft_types: ClassVar[tuple[str, ...]] = (PEFT_TYPE,)

    targets: str | tuple[str, ...] = "all"
    """Which norms."""

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """Copies of each norm's tensors."""
        return Attachment({site: self._delta(context.layer(site)) for site in sites})

    def _delta(self, layer: nn.Module) -> NormDelta:
        own = dict(layer.named_parameters(recurse=False))
        return NormDelta(own["weight"], own.get("bias"))

    def to_peft(self, attachment: Attachment, model: nn.Module) -> PeftPart:
        """PEFT's LN tuning, which holds copies too."""
        tensors = {f"{site.path}{PEFT_NAME}{key}": tensor.detach()
                   for site, delta in attachment.deltas.items() for key, tensor in delta.override().items()}
        return PeftPart({"peft_type": PEFT_TYPE, "target_modules": [site.path for site in attachment.deltas]}, tensors)

    @classmethod
    def from_peft(cls, adapter: PeftPart, model: nn.Module) -> PeftReading | None:
        """PEFT's LN tuning."""
        refuse_fields(adapter.config, PEFT_COMMON)
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in adapter.tensors.items():
            path, mark, key = name.partition(PEFT_NAME)
            if mark:
                found.setdefault(path, {})[key] = tensor
        if not found:
            raise CheckpointError("the adapter holds no ln_tuning_layers")
        sites = whole_sites(model, cls, found)
        method = cls(targets=peft_targets(adapter.config, cls, model, found))
        used = frozenset(f"{path}{PEFT_NAME}{key}" for path, tensors in found.items() for key in tensors)
        return PeftReading(method, {sites[path].name: tensors for path, tensors in found.items()}, used)
