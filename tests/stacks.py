"""Tiny models with kernels, experts and a layer of one's own, and a method of low-rank changes of stacks for the tests alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltaloom.deltas.base import Attachment, Delta, Method
from deltaloom.sites import Kind
from deltaloom.stacks import register_site

VOCABULARY = 64
CONVOLUTIONAL = ("convnext", "resnet")
EXPERTS = ("mixtral", "qwen3-moe", "gpt-oss", "llama4")
TURNED = ("gpt-oss", "llama4")  # store (experts, d_in, d_out)
STACKED = (*CONVOLUTIONAL, *EXPERTS, "own")


class LowRankStackDelta(Delta):
    """increment = up @ down, slice by slice; up starts at zero."""

    def __init__(self, tensor: str, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.tensor = tensor
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

    def increments(self) -> dict[str, Tensor]:
        return {self.tensor: self.up @ self.down}


class LowRankStack(Method):
    """up (slices, d_out, rank) @ down (slices, rank, d_in)."""

    name: ClassVar[str] = "low-rank-stack"
    kinds: ClassVar[tuple[Kind, ...]] = ("stack",)
    targets: str | tuple[str, ...] = "all"
    rank: int = 2

    def attach(self, sites, context):
        deltas = {}
        for site in sites:
            down = torch.randn(site.slices, self.rank, site.d_in, generator=context.generator)
            deltas[site] = LowRankStackDelta(site.tensor, torch.zeros(site.slices, site.d_out, self.rank), down)
        return Attachment(deltas)


class Bilinear(nn.Module):
    """y[o] = sum over a, b of core[o, a, b] x[a] x[b]"""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.core = nn.Parameter(torch.randn(out, width, width) * 0.3)
        self.counter = nn.Parameter(torch.zeros(2, 2, dtype=torch.int64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("oab,...a,...b->...o", self.core.to(x.dtype), x, x)


class Own(nn.Module):
    """A model that is none of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.bilinear = Bilinear(5, 3)

    def forward(self, features: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.bilinear(self.first(features))
        return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))


register_site(Bilinear, "core")


def stacked(layout: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model in evaluation mode with random weights."""
    import transformers as t

    decoder = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
               "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
               "num_experts_per_tok": 2}
    images = {"num_channels": 1, "hidden_sizes": [4, 6], "depths": [1, 1], "num_labels": 3}
    makers = {
        "convnext": lambda: t.ConvNextForImageClassification(t.ConvNextConfig(**images, num_stages=2, patch_size=2)),
        "resnet": lambda: t.ResNetForImageClassification(t.ResNetConfig(**images, embedding_size=4, layer_type="basic")),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**decoder, num_local_experts=4)),
        "qwen3-moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(
            **decoder, num_experts=4, moe_intermediate_size=8, head_dim=4)),
        "gpt-oss": lambda: t.GptOssForCausalLM(t.GptOssConfig(**decoder, num_local_experts=4, head_dim=4)),
        "llama4": lambda: t.Llama4ForCausalLM(t.Llama4TextConfig(
            **decoder, num_local_experts=4, head_dim=4, intermediate_size_mlp=24, attention_chunk_size=32)),
        "own": Own,
    }
    torch.manual_seed(0)
    model = makers[layout]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and layout != "own":
                parameter.copy_(torch.randn_like(parameter) * 0.3) if parameter.ndim > 1 else \
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().to(dtype)


def stacked_batch(layout: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs that fit the layout, with labels."""
    generator = torch.Generator().manual_seed(1)
    if layout in CONVOLUTIONAL:
        return {"pixel_values": torch.randn(3, 1, 16, 16, generator=generator).to(dtype), "labels": torch.tensor([0, 1, 2])}
    if layout == "own":
        return {"features": torch.randn(3, 4, generator=generator).to(dtype), "labels": torch.tensor([0, 1, 2])}
    ids = torch.randint(3, VOCABULARY, (3, 5), generator=generator)
    return {"input_ids": ids, "labels": ids}
