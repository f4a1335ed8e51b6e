"""(IA)3: learned vectors scale keys, values and the inner activations of the mlp.

    y = l * (W x + b)          at keys and values: the layer's output is scaled
    y = W (l * x) + b          at the mlp's last layer: its input is scaled

Liu et al. 2022 (arXiv 2205.05638). All vectors start at one, so nothing changes at birth. Keys and values that a fused
layer computes (GPT-2's c_attn, Phi-3's qkv_proj) are its parts `k` and `v`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltaloom.deltas.base import AttachContext, Attachment, Delta, Method
from deltaloom.errors import TargetError
from deltaloom.sites import Kind, Site


class Ia3Delta(Delta):
    """A vector at one site: (d_in,) if it scales the input (`feedforward`), else (d_out,)."""

    def __init__(self, width: int, feedforward: bool) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.ones(width))
        self.feedforward = feedforward

    def before(self, x: Tensor) -> Tensor:
        """The scaled input, if it is this that is scaled."""
        return x * self.vector.to(x.dtype) if self.feedforward else x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The scaled output, if it is this that is scaled."""
        return y if self.feedforward else y * self.vector.to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Columns scaled for the input; rows and bias scaled for the output."""
        vector = self.vector.detach().to(weight.dtype)
        if self.feedforward:
            return weight * vector, bias
        return weight * vector[:, None], None if bias is None else bias * vector


class IA3(Method):
    """Infused adapter by inhibiting and amplifying inner activations."""

    name: ClassVar[str] = "ia3"
    kinds: ClassVar[tuple[Kind, ...]] = ("linear",)

    targets: str | tuple[str, ...] = ("k", "v", "down")
    """Which linear layers; keys, values and the mlp's last layer by default."""
    feedforward: tuple[str, ...] = ("down",)
    """Roles whose input is scaled; the output of all others."""

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """One vector for each site.

        Raises:
            TargetError: the input of a fused layer's part is to be scaled; its other parts read the same input.
        """
        fused = [site.name for site in sites if site.part is not None and site.role in self.feedforward]
        if fused:
            raise TargetError("the parts of a fused layer share one input, which cannot be scaled for one of them", got=fused[0],
                              hint="Take these roles out of `feedforward`.", problems=fused)
        return Attachment({site: self._delta(site) for site in sites})

    def _delta(self, site: Site) -> Ia3Delta:
        feedforward = site.role in self.feedforward
        return Ia3Delta(site.d_in if feedforward else site.d_out, feedforward)
