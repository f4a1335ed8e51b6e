"""LoRA: a low-rank change of an affine layer or of embeddings.

    y = W x + b + scale * B (A x),     scale = alpha / rank, or alpha / sqrt(rank) (rsLoRA)

Reparameterisation-based delta tuning. A starts Gaussian and B at zero, so nothing changes at birth.
Hu et al. 2021 (arXiv 2106.09685); rank-stabilised scale: Kalajdzievski 2023 (2312.03732); initial values from the
weight's largest singular directions: PiSSA, Meng et al. 2024 (2404.02948).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from deltaloom.deltas.base import AttachContext, Attachment, LowRankDelta, Method
from deltaloom.sites import Kind, Site


class LoraDelta(LowRankDelta):
    """B A at one site: `down` is A (rank, d_in), `up` is B (d_out, rank)."""

    scale: Tensor

    def __init__(self, down: Tensor, up: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.register_buffer("scale", torch.full((down.shape[0],), scale), persistent=False)
        self.dropout = dropout

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, the constant scale, B."""
        return self.down, self.scale, self.up


class LoRA(Method):
    """Low-rank adaptation."""

    name: ClassVar[str] = "lora"
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "embedding")

    rank: int = Field(8, ge=1)
    """Rank of the change at each site."""
    alpha: float = Field(16.0, gt=0)
    """Numerator of the scale."""
    rslora: bool = False
    """Scale alpha / sqrt(rank) instead of alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the layer's inputs that the change does not see in training."""
    init: Literal["gaussian"] = "gaussian"
    """Initial values of A."""

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """One A and one B for each site."""
        return Attachment({site: self._delta(site, context) for site in sites})

    def _delta(self, site: Site, context: AttachContext) -> LoraDelta:
        rank, alpha = self.rank, self.alpha
        down = torch.randn(rank, site.d_in, generator=context.generator) / math.sqrt(site.d_in)
        scale = alpha / math.sqrt(rank) if self.rslora else alpha / rank
        return LoraDelta(down, torch.zeros(site.d_out, rank), scale, self.dropout)
