"""BitFit: only biases train.

    y = W x + (b + c),     c trainable and zero at first

Specification-based delta tuning. Ben Zaken et al. 2022 (arXiv 2106.10199). By default every linear layer and norm that has
a bias gets an increment c. A model without any bias (Llama) gets new ones at the linear layers inside its blocks. The head
is left alone: the task trains it whole, and a language model's shares its weights with the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltaloom.deltas.base import AttachContext, Attachment, Delta, Method, layer_indices
from deltaloom.sites import Kind, Site, all_sites, find_sites


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
