"""LoRA: a low-rank change of an affine layer or of embeddings.

    y = W x + b + scale * B (A x),     scale = alpha / rank, or alpha / sqrt(rank) (rsLoRA)

Reparameterisation-based delta tuning. On affine layers A starts Gaussian and B at zero, on embeddings A at zero and B Gaussian
(as in the authors' loralib, so that only rows that were seen change); nothing changes at birth.
`init: pissa` starts A and B at the weight's largest singular directions instead. PiSSA takes them out of the base; here the
base stays as it is, for every other delta on it, and the frozen starting pair is subtracted,
y = W x + b + scale * (B A - B0 A0) x, which is a LoRA of twice the rank, and is written as one to PEFT's format.
Hu et al. 2021 (arXiv 2106.09685); rank-stabilised scale: Kalajdzievski 2023 (2312.03732); PiSSA: Meng et al. 2024 (2404.02948).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaloom.compact.face import affine_shape, is_conv1d
from deltaloom.deltas._peft import by_suffix, peft_targets, whole_sites
from deltaloom.deltas._ranked import PEFT_TYPE, RankedMethod, alpha_of, check_peft_ranks, read_peft_settings, write_peft_config
from deltaloom.deltas.base import AttachContext, Attachment, Components, Delta, LowRankDelta, PeftPart, PeftReading
from deltaloom.errors import CheckpointError, RefusedError
from deltaloom.kernels.dropout import dropout
from deltaloom.sites import Kind, Site

A_NAMES = (".lora_A.weight", ".lora_embedding_A")
B_NAMES = (".lora_B.weight", ".lora_embedding_B")
EMBEDDED = ".base_layer.weight"  # PEFT saves a copy of targeted embeddings with the adapter


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


class PissaDelta(LowRankDelta):
    """B A - B0 A0 at one site: the trained pair, and the pair that it started from, frozen."""

    scale: Tensor
    down_start: Tensor
    up_start: Tensor

    def __init__(self, down: Tensor, up: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.register_buffer("down_start", down.clone())
        self.register_buffer("up_start", up.clone())
        self.register_buffer("scale", torch.full((2 * down.shape[0],), scale), persistent=False)
        self.dropout = dropout

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """[A; A0], the constant scale, [B, -B0]."""
        return torch.cat((self.down, self.down_start)), self.scale, torch.cat((self.up, -self.up_start), 1)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y plus the difference of the two products, each made alone: equal pairs then cancel to the last bit."""
        scale = self.scale[0].to(y.dtype)
        if not x.is_floating_point():
            low, start = (functional.embedding(x, down.to(y.dtype).T) for down in (self.down, self.down_start))
        else:
            x = dropout(x, self.dropout, self.training)
            low, start = (x @ down.to(y.dtype).T for down in (self.down, self.down_start))
        return y + ((low * scale) @ self.up.to(y.dtype).T - (start * scale) @ self.up_start.to(y.dtype).T)


class LoRA(RankedMethod):
    """Low-rank adaptation."""

    name: ClassVar[str] = "lora"
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "embedding")
    peft_types: ClassVar[tuple[str, ...]] = (PEFT_TYPE,)
    offers: ClassVar[Mapping[str, Any] | None] = {"rank": 4, "alpha": 8}
    asked_as: ClassVar[Mapping[str, str]] = {
        "qlora": "That is a combination: quantise the base and use lora: write base: {quantise: nf4} and deltas: "
                 "[{method: lora}] in the run file.",
        "rslora": "Write: {method: lora, rslora: true}.",
        "pissa": "Write: {method: lora, init: pissa}."}

    init: Literal["gaussian", "pissa"] = "gaussian"
    """Initial values: random, or the weight's largest singular directions."""

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """One A and one B for each site."""
        return Attachment({site: self._delta(site, rank, scale, context)
                           for site, (rank, scale) in self.ranks(sites).items()})

    def _delta(self, site: Site, rank: int, scale: float, context: AttachContext) -> LoraDelta | PissaDelta:
        if self.init == "pissa":
            if rank > min(site.d_in, site.d_out):
                raise RefusedError("a weight has fewer singular directions than the rank asks for",
                                   got=f"rank {rank} at {site.name} ({site.d_out}, {site.d_in})")
            if context.loading:
                return PissaDelta(torch.zeros(rank, site.d_in), torch.zeros(site.d_out, rank), scale, self.dropout)
            down, up = _singular_pair(context.weight(site), rank, context.generator)
            return PissaDelta(down / math.sqrt(scale), up / math.sqrt(scale), scale, self.dropout)
        down, up = torch.zeros(rank, site.d_in), torch.zeros(site.d_out, rank)
        if not context.loading:
            if site.kind == "embedding":
                up.normal_(generator=context.generator)
            else:
                down.normal_(0.0, 1.0 / math.sqrt(site.d_in), generator=context.generator)
        return LoraDelta(down, up, scale, self.dropout)

    def components(self, delta: Delta) -> Components:
        """Rank-one terms; a column of B that is zero does nothing.

        Raises:
            RefusedError: PiSSA's terms have a frozen start that belongs to them.
        """
        if self.init == "pissa":
            raise RefusedError("PiSSA's terms start at frozen ones, from which none can be taken away",
                               hint="Write init: gaussian.")
        return Components({"down": 0, "up": 1}, "up", ("scale",))

    def resized(self, site: Site, count: int) -> dict[str, Any]:
        """The rank, and the alpha that keeps the scale."""
        _, scale = self._rank_and_scale(site)
        return {"rank": count, "alpha": alpha_of(count, scale, self.rslora), "rank_pattern": {}, "alpha_pattern": {}}

    def to_peft(self, attachment: Attachment, model: nn.Module) -> PeftPart:
        """One pair for each layer; several parts of a fused layer become one pair with zero rows around each part."""
        pairs: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
        kinds: dict[str, Kind] = {}
        scales = {site: scale for site, (_, scale) in self.ranks(list(attachment.deltas)).items()}
        for site, delta in attachment.deltas.items():
            if not isinstance(delta, LowRankDelta):
                raise RefusedError("not a low-rank delta", got=site.name)
            down, _, up = (factor.detach() for factor in delta.factors())
            if site.part is not None:
                start, stop = site.part
                width = affine_shape(model.get_submodule(site.path))[0]
                up = functional.pad(up, (0, 0, start, width - stop))
            pairs.setdefault(site.path, []).append((down, up, scales[site]))
            kinds[site.path] = site.kind
        tensors: dict[str, Tensor] = {}
        for path, found in pairs.items():
            common = found[0][2]
            embedding = kinds[path] == "embedding"
            tensors[path + A_NAMES[embedding]] = torch.cat([down for down, _, _ in found])
            tensors[path + B_NAMES[embedding]] = torch.cat([up * (scale / common) for _, up, scale in found], 1)
        ranks = {path: sum(down.shape[0] for down, _, _ in found) for path, found in pairs.items()}
        config = write_peft_config(self, ranks, {path: found[0][2] for path, found in pairs.items()}, dora=False,
                                   transposed=all(is_conv1d(model.get_submodule(path)) for path in ranks))
        return PeftPart(config, tensors)

    @classmethod
    def from_peft(cls, adapter: PeftPart, model: nn.Module) -> PeftReading | None:
        """The pairs `lora_A`, `lora_B` and `lora_embedding_A`, `lora_embedding_B` of PEFT's LoRA."""
        if adapter.config.get("use_dora"):
            return None
        down, up = by_suffix(adapter.tensors, *A_NAMES), by_suffix(adapter.tensors, *B_NAMES)
        alone = sorted(set(down) ^ set(up))
        if alone or not down:
            raise CheckpointError("lora_A and lora_B do not come in pairs" if alone else "the adapter holds no lora_A",
                                  problems=alone[:20])
        sites = whole_sites(model, cls, down)
        ranks = {path: _rank_of(path, down[path], up[path]) for path in down}
        settings = read_peft_settings(adapter.config, ranks)
        method = cls.parse(settings | {"targets": peft_targets(adapter.config, cls, model, down)}, "adapter_config.json")
        check_peft_ranks(method, sites, ranks)
        used = {path + name for path in down for name in (*A_NAMES, *B_NAMES) if path + name in adapter.tensors}
        used |= _unchanged_embeddings(adapter, sites, model)
        state = {sites[path].name: {"down": down[path], "up": up[path]} for path in down}
        return PeftReading(method, state, frozenset(used))


def _rank_of(path: str, down: Tensor, up: Tensor) -> int:
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or down.shape[0] == 0:
        raise CheckpointError(f"{path}: lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)} are not a pair (rank, d_in), "
                              "(d_out, rank)")
    return down.shape[0]


def _unchanged_embeddings(adapter: PeftPart, sites: dict[str, Site], model: nn.Module) -> set[str]:
    """Names of the copies of embeddings that the adapter holds.

    Raises:
        RefusedError: a copy is not what this base has: the adapter was made with changed or resized embeddings.
    """
    names = set()
    for path in sites:
        name = path + EMBEDDED
        if name in adapter.tensors:
            own, saved = model.get_submodule(path).weight, adapter.tensors[name]
            same = isinstance(own, Tensor) and own.shape == saved.shape and torch.equal(own.detach().cpu(), saved.to(own.dtype))
            if not same:
                raise RefusedError("the adapter holds embeddings that differ from this base's", got=name,
                                   hint="It belongs to a base with other or resized embeddings: give that one as the model.")
            names.add(name)
    return names


def _singular_pair(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(rank, d_in) and (d_out, rank) whose product is the weight's best approximation of that rank.

    Large matrices by four subspace iterations (Halko et al. 2011), as PiSSA's authors do: an inexact start costs no exactness.
    """
    if min(weight.shape) <= 256:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
    else:
        basis = torch.randn(weight.shape[1], rank + 16, generator=generator).to(weight.device)
        for _ in range(4):
            basis = torch.linalg.qr(weight.T @ torch.linalg.qr(weight @ basis).Q).Q
        u, s, v = torch.linalg.svd(weight @ basis, full_matrices=False)
        v = v @ basis.T
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).contiguous(), (u[:, :rank] * root).contiguous()
