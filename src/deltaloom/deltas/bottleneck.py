"""Bottleneck adapters: a small two-layer network that adds to the output of a sub-layer.

    sequential:  y + s * (U act(D y + c) + e)        y: output of the sub-layer, before the residual sum
    parallel:    y + s * (U act(D x + c) + e)        x: input of the sub-layer (after the norm, where the norm comes first)

`houlsby` puts a sequential one after every sub-layer (also after a decoder's cross-attention), Houlsby et al. 2019
(arXiv 1902.00751); `pfeiffer` one after each block's mlp, Pfeiffer et al. 2021 (2005.00247); `parallel` one beside each
block's mlp, He et al. 2022 (2110.04366), where a fixed scale of 4 did best ("scaled parallel"). U and e start at zero, so
nothing changes at birth. `bias: false` leaves out e, which belongs to no single unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from deltaloom.deltas.base import AttachContext, Attachment, Components, Delta, Method, layer_indices
from deltaloom.errors import RefusedError
from deltaloom.sites import Kind, Site, find_sites

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu, "gelu": functional.gelu, "silu": functional.silu, "identity": lambda x: x,
}
PLACEMENTS = {"houlsby": "all", "pfeiffer": "mlp", "parallel": "mlp"}  # the branches that each stands on


class BottleneckDelta(Delta):
    """The small network at one branch: `down` is D (size, width), `up` is U (d_out, size)."""

    def __init__(self, down: Tensor, d_out: int, activation: str, scale: float, learned: bool, parallel: bool,
                 bias: bool) -> None:
        super().__init__()
        size = down.shape[0]
        self.down = nn.Parameter(down)
        self.down_bias = nn.Parameter(torch.zeros(size))
        self.up = nn.Parameter(torch.zeros(d_out, size))
        self.up_bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        self.scale = nn.Parameter(torch.tensor(scale)) if learned else scale
        self.activation = activation
        self.parallel = parallel

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y plus the network's output; it reads x in parallel placement, y in sequential."""
        source = x.to(y.dtype) if self.parallel else y
        hidden = functional.linear(source, self.down.to(y.dtype), self.down_bias.to(y.dtype))
        bias = None if self.up_bias is None else self.up_bias.to(y.dtype)
        added = functional.linear(ACTIVATIONS[self.activation](hidden), self.up.to(y.dtype), bias)
        return y + added * (self.scale.to(y.dtype) if isinstance(self.scale, Tensor) else self.scale)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Refuses: the network is not affine in the layer's input."""
        raise RefusedError("a bottleneck is a network of its own, it cannot be folded into the layer's weights",
                           hint="Keep the delta next to the model.")


class Bottleneck(Method):
    """Bottleneck adapters of Houlsby, Pfeiffer and He et al."""

    name: ClassVar[str] = "bottleneck"
    kinds: ClassVar[tuple[Kind, ...]] = ("branch",)
    offers: ClassVar[Mapping[str, Any] | None] = {"size": 8, "bias": False}
    asked_as: ClassVar[Mapping[str, str]] = dict.fromkeys(("adapter", "adapters", "houlsby", "pfeiffer"),
                                                          "Write: {method: bottleneck}; its placement says where.")

    targets: str | tuple[str, ...] = "placement"
    """Which branches (`attention`, `cross_attention`, `mlp`); `placement`: those that the placement stands on."""
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    """After every sub-layer, after each mlp, or beside each mlp."""
    size: int = Field(64, ge=1)
    """Width of the bottleneck."""
    activation: Literal["relu", "gelu", "silu", "identity"] = "relu"
    """What lies between D and U."""
    scale: float | Literal["learned"] = 1.0
    """Factor of what is added; `learned`: one trainable number at each site, 1 at first."""
    bias: bool = True
    """Whether what is added has a bias e of its own."""

    def sites(self, model: nn.Module) -> list[Site]:
        """The branches that the targets, or else the placement, name."""
        targets = PLACEMENTS[self.placement] if self.targets == "placement" else self.targets
        return find_sites(model, targets, self.kinds, layer_indices(self.layers))

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """One small network for each branch."""
        return Attachment({site: self._delta(site, context) for site in sites})

    def _delta(self, site: Site, context: AttachContext) -> BottleneckDelta:
        parallel = self.placement == "parallel"
        width = site.d_in if parallel else site.d_out
        down = torch.randn(self.size, width, generator=context.generator) / math.sqrt(width)
        learned = self.scale == "learned"
        scale = 1.0 if isinstance(self.scale, str) else self.scale
        return BottleneckDelta(down, site.d_out, self.activation, scale, learned, parallel, self.bias)

    def components(self, delta: Delta) -> Components:
        """Units: a row of D, its entry of c, a column of U.

        Raises:
            RefusedError: the output bias or a learned scale belong to all units together.
        """
        if self.bias or self.scale == "learned":
            raise RefusedError("an output bias or a learned scale belongs to no single unit of a bottleneck",
                               hint="Write bias: false and a number as scale.")
        return Components({"down": 0, "down_bias": 0, "up": 1}, "up")

    def resized(self, site: Site, count: int) -> dict[str, Any]:
        """The number of units."""
        return {"size": count}
