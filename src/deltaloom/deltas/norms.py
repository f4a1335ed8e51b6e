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

from deltaloom.deltas.base import AttachContext, Attachment, Delta, Method, master_copy
from deltaloom.sites import Kind, Site


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

    targets: str | tuple[str, ...] = "all"
    """Which norms."""

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """Copies of each norm's tensors."""
        return Attachment({site: self._delta(context.layer(site)) for site in sites})

    def _delta(self, layer: nn.Module) -> NormDelta:
        own = dict(layer.named_parameters(recurse=False))
        return NormDelta(own["weight"], own.get("bias"))
