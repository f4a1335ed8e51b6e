"""Route: a pool of prefixes or prompts, and a small gate on the input text that picks which of them act, row by row.

    f = (mean over the text's tokens of their frozen input embeddings - c) / s         p = softmax(W f + b)
    log w_k = log p_k - stop_gradient(log sum over the top entries of p)               of the top entries; others do not act
    softmax([q K_1 + log w_1, ..., q K]) [V_1; ...; V]       prefixes;        sum_k w_k P_k       prompts
    loss + balance * pool * sum_k f_k mean(p_k)              f_k: share of the choices that fell on k

The weights of a row sum to 1 and have the gradient of log p, so that a single pick learns too. c and s are mean and spread of the
first batches' texts, since means of embeddings have most in common with one another. W starts random, so that texts that
differ begin with different entries. The choice is made once for each row, from its text alone: padding is left out, packed rows
count each for itself, in causal models what is learned or written is no part of it (docs/route.md).
Mixtures of experts: Shazeer et al. 2017 (arXiv 1701.06538); the balance is that of Switch, Fedus et al. 2021 (2101.03961); pools
of prompts chosen by the input: Wang et al. 2022 (L2P, 2112.08654).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaloom.deltas._layout import BatchLayout, Places, TextReader
from deltaloom.deltas.base import (
    AttachContext,
    Attachment,
    Delta,
    InputDelta,
    Method,
    PrefixDelta,
    method_from,
    method_record,
)
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.sites import Kind, Site, input_layer

OWN = "delta"
CALLS = 64     # of training, from which the mean and the spread of texts are taken
LEAST = 0.1    # of the size of a text's mean: what the spread is at least


class RouteGate(TextReader):
    """W, b, and what the texts of the first batches look like; keeps the last choice in the layout."""

    centre: Tensor
    square: Tensor
    seen: Tensor

    def __init__(self, width: int, pool: int, top: int, balance: float, layout: BatchLayout, path: str | None,
                 generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(pool, width, generator=generator) / math.sqrt(width))
        self.bias = nn.Parameter(torch.zeros(pool))
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("square", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.top, self.balance, self.layout, self.path = top, balance, layout, path
        self._texts: Tensor | None = None  # of the last call in training, for the balance

    def __getstate__(self) -> dict[str, Any]:
        """Without the texts of a call."""
        return {**super().__getstate__(), "_texts": None}

    def read(self, embeds: Tensor, places: Places) -> None:
        """Choose for each row."""
        texts = text_means(embeds.to(self.weight.dtype), places)
        if self.training:
            self._learn(texts)
            self._texts = texts
        logs = self._logs(texts)
        best = logs.detach().topk(self.top, -1)
        weights = logs - best.values.logsumexp(-1, keepdim=True)
        chosen = torch.zeros_like(logs, dtype=torch.bool).scatter_(-1, best.indices, True)
        self.layout.choices[id(self)] = weights.masked_fill(~chosen, -torch.inf)

    def log_weights(self) -> Tensor:
        """(rows, pool): log w, -inf for what does not act."""
        return self.layout.choice(self)

    def used(self) -> Tensor:
        """(rows, pool): the weights of the last call's rows."""
        return self.layout.choice(self).detach().exp()

    def penalty(self) -> Tensor | None:
        """The balance, on the last call in training."""
        if not self.balance or self._texts is None:
            return None
        logs = self._logs(self._texts)
        picked = torch.zeros_like(logs).scatter_(-1, logs.detach().topk(self.top, -1).indices, 1.0 / self.top)
        return self.balance * logs.shape[-1] * (picked.mean(0) * logs.exp().mean(0)).sum()

    def _logs(self, texts: Tensor) -> Tensor:
        size = self.centre.square().mean()
        spread = (self.square - size).clamp_min(0) + LEAST ** 2 * self.square
        spread = torch.where(self.seen > 0, spread.sqrt(), torch.ones_like(spread)).clamp_min(1e-12)
        return torch.log_softmax(((texts - self.centre) / spread) @ self.weight.T + self.bias, -1)

    @torch.no_grad()
    def _learn(self, texts: Tensor) -> None:
        """Running means over the first calls."""
        if int(self.seen) < CALLS:
            self.seen += 1
            share = 1.0 / int(self.seen)
            self.centre += (texts.mean(0) - self.centre) * share
            self.square += (texts.square().mean() - self.square) * share


def text_means(embeds: Tensor, places: Places) -> Tensor:
    """(rows, d_model): the mean over each row's text of (batch, time, d_model); a row without any counts with its first token."""
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if places.mask is None else places.mask
    mask = mask.to(embeds.device)
    if places.lengths is not None:
        pieces = zip(embeds[0].split(places.lengths), mask[0].split(places.lengths), strict=True)
        return torch.cat([text_means(piece[None], Places(own[None])) for piece, own in pieces])
    first = torch.zeros_like(mask)
    first[:, 0] = True
    mask = torch.where(mask.any(1, keepdim=True), mask, first)
    return (embeds * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class RoutedPrefix(PrefixDelta):
    """A pool of prefixes at one attention module, each row seeing those that its gate picks."""

    changes_at_birth = "queries see new keys and values from the start"
    gates = True

    def __init__(self, pool: Sequence[PrefixDelta], gate: RouteGate, leads: bool) -> None:
        super().__init__()
        self.pool = nn.ModuleList(pool)
        self.gate = (gate,)  # in a tuple: it has its place among the shared modules
        self.leads = leads   # the first of all, which says the gate's penalty
        self.spares_first = pool[0].spares_first

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Those of the whole pool, one after another."""
        pairs = [delta.keys_values() for delta in self.pool if isinstance(delta, PrefixDelta)]
        return torch.cat([keys for keys, _ in pairs]), torch.cat([values for _, values in pairs])

    def log_gate(self, x: Tensor) -> Tensor:
        """(rows, 1, pool * length): each key has the weight of its prefix."""
        lengths = [len(delta.keys_values()[0]) for delta in self.pool if isinstance(delta, PrefixDelta)]
        weights = self.gate[0].log_weights()
        return weights.repeat_interleave(torch.tensor(lengths, device=weights.device), -1)[:, None]

    def penalty(self) -> Tensor | None:
        """The gate's balance, said once, and what the prefixes say."""
        return _penalty(self.pool, self.gate[0] if self.leads else None)


class RoutedRows(InputDelta):
    """A pool of prompts, each row getting the mean of those that its gate picks."""

    changes_at_birth = "the model reads new rows from the start"

    def __init__(self, pool: Sequence[InputDelta], gate: RouteGate) -> None:
        super().__init__()
        self.pool = nn.ModuleList(pool)
        self.gate = (gate,)

    def rows(self) -> Tensor:
        """(rows, length, d_model)"""
        prompts = torch.stack([delta.rows() for delta in self.pool if isinstance(delta, InputDelta)])
        weights = self.gate[0].log_weights().exp()
        return (weights @ prompts.flatten(1)).unflatten(1, prompts.shape[1:])

    def penalty(self) -> Tensor | None:
        """The gate's balance, and what the prompts say."""
        return _penalty(self.pool, self.gate[0])


def _penalty(pool: nn.ModuleList, gate: RouteGate | None) -> Tensor | None:
    found = [delta.penalty() for delta in pool if isinstance(delta, Delta)] + ([] if gate is None else [gate.penalty()])
    terms = [term for term in found if term is not None]
    return torch.stack(terms).sum() if terms else None


class Route(Method):
    """A pool of prefixes or prompts, picked row by row."""

    name: ClassVar[str] = "route"
    kinds: ClassVar[tuple[Kind, ...]] = ("attention", "input")

    targets: str | tuple[str, ...] = OWN
    """Which sites; `delta`: those of the method's own targets."""
    delta: dict[str, Any]
    """The method of which there is a pool, as an entry of `deltas` states it: a prefix or a prompt."""
    pool: int = Field(8, ge=2)
    """How many there are."""
    top: int = Field(2, ge=1)
    """How many of them act on a row."""
    balance: float = Field(0.01, ge=0)
    """Weight of the balance between the entries in the loss."""

    @field_validator("delta")
    @classmethod
    def _complete(cls, record: dict[str, Any]) -> dict[str, Any]:
        """The record with all its settings."""
        if record.get("method") == cls.name:
            raise ValueError("a pool of pools is a larger pool: raise pool instead")
        try:
            return method_record(method_from(record, OWN))
        except SettingsError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _check_top(self) -> Self:
        if self.top > self.pool:
            raise ValueError(f"top {self.top} is more than there are in the pool of {self.pool}")
        return self

    def inner(self) -> Method:
        """The method of the pool, with the targets and layers that are given here in place of its own."""
        given = {"targets": None if self.targets == OWN else self.targets, "layers": self.layers}
        return method_from(self.delta | {key: value for key, value in given.items() if value is not None}, OWN)

    def sites(self, model: nn.Module) -> list[Site]:
        """Those of the method of the pool."""
        return self.inner().sites(model)

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """One pool for each site, and one gate for all.

        Raises:
            RefusedError: a method that puts no rows in front, or a model that reads no text.
        """
        inner = self.inner()
        made = [inner.attach(sites, context) for _ in range(self.pool)]
        deltas = [each.deltas for each in made]
        kinds = {PrefixDelta if isinstance(delta, PrefixDelta) and not delta.gates else
                 InputDelta if isinstance(delta, InputDelta) else Delta for each in deltas for delta in each.values()}
        if len(kinds) > 1 or Delta in kinds or any(each.shared for each in made):
            raise RefusedError(f"there is no pool of '{inner.name}' to pick from", got=self.delta,
                               legal="a plain prefix or prompt, each with numbers of its own",
                               hint="For other methods see `gated`, or lanes.")
        gate = self._gate(context, before=InputDelta in kinds)
        routed: dict[Site, Delta] = {}
        for site in deltas[0]:
            prefixes = [delta for each in deltas if isinstance(delta := each[site], PrefixDelta)]
            prompts = [delta for each in deltas if isinstance(delta := each[site], InputDelta)]
            routed[site] = RoutedRows(prompts, gate) if prompts else RoutedPrefix(prefixes, gate, not routed)
        return Attachment(routed, {"gate": gate})

    def _gate(self, context: AttachContext, *, before: bool) -> RouteGate:
        model = context.model
        layer = input_layer(model)
        if not isinstance(model, PreTrainedModel) or not isinstance(layer, nn.Embedding):
            raise RefusedError("a choice by the input text needs a model that reads tokens", got=type(model).__name__)
        path = None
        if not before:
            reads = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
            path = next(name for name, module in model.named_modules() if module is reads)
            context.layout.watch(path)
        width = layer.embedding_dim
        return RouteGate(width, self.pool, self.top, self.balance, context.layout, path, context.generator)
