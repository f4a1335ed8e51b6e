"""Prefix tuning: trainable keys and values in front of a layer's own, seen by every query.

    attention(Q, [P_k; K], [P_v; V])

Addition-based delta tuning. Li and Liang 2021 (arXiv 2101.00190); P-tuning v2, Liu et al. 2021 (2110.07602). The reparametrised
form makes all layers' prefixes from one small table by a two-layer network, once per step; the table and the network are kept,
so training goes on from them, and PEFT's files get the keys and values themselves.

A prefix has no position: the text keeps its positions, which with rotary ones is the same as P tokens before the text.

Decoders rest on their first token: it sees itself alone, and the others attend to it where they want nothing (attention sinks,
Xiao et al. 2023, arXiv 2309.17453). A prefix on every layer takes its place. A prefix on the first layers alone takes it away
from the layers above, so there the first token does not see the prefix (`first_token`). Measured on SmolLM2-135M
(docs/results/private.md), loss 2.21 without a prefix: one on the first two of 30 layers gives 5.90 at birth if the first token
sees it and 2.24 if it does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaloom.attention import attention_shape, check_supported
from deltaloom.deltas._peft import refuse_fields
from deltaloom.deltas._positions import PositionShift, is_rotary, keys_values, position_table, turned
from deltaloom.deltas._tokens import text_tokens, vocabulary_tokens
from deltaloom.deltas.base import AttachContext, Attachment, Components, Delta, Method, PeftPart, PeftReading, PrefixDelta
from deltaloom.errors import CheckpointError, RefusedError
from deltaloom.sites import Kind, Site, all_sites, input_layer

PEFT_TYPE = "PREFIX_TUNING"
PEFT_READ = ("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
             "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
             "encoder_hidden_size", "prefix_projection", "init_weights", "modules_to_save")
AT_BIRTH = "every query sees new keys and values from the start"


class DirectPrefix(PrefixDelta):
    """Keys and values of one attention module, each (length, kv_heads, head_dim)."""

    changes_at_birth = AT_BIRTH

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys = nn.Parameter(keys)
        self.values = nn.Parameter(values)

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """The parameters themselves."""
        return self.keys, self.values


class PrefixNetwork(nn.Module):
    """tanh(E W1 + b1) W2 + b2: the keys and values of all layers from a table E (length, width)."""

    def __init__(self, length: int, hidden: int, shapes: Sequence[tuple[int, int]], generator: torch.Generator) -> None:
        super().__init__()
        width = shapes[0][0] * shapes[0][1]
        self.shapes = tuple(shapes)
        self.table = nn.Parameter(torch.randn(length, width, generator=generator))
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, sum(2 * heads * size for heads, size in shapes))
        for layer in (self.inner, self.outer):
            bound = layer.in_features ** -0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.zeros_(layer.bias)
        self._made: tuple[tuple[int, ...], Tensor, tuple[Tensor, ...]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what the last step made, which belongs to its graph and cannot be copied."""
        return {**self.__dict__, "_made": None}

    def forward(self) -> Tensor:
        """(length, sum over layers of 2 * kv_heads * head_dim)"""
        return self.outer(torch.tanh(self.inner(self.table)))

    def part(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the `index`-th layer; computed for all layers when the first one asks, or the parameters moved."""
        sources = (self.table, self.inner.weight, self.inner.bias, self.outer.weight, self.outer.bias)
        stamp = (int(torch.is_grad_enabled()), *(source._version for source in sources), *map(id, sources))
        if self._made is None or self._made[0] != stamp or (index == 0 and torch.is_grad_enabled()):
            with _kept():
                made = self()
            if made.requires_grad:
                made.register_hook(self._forget)
            self._made = (stamp, made, sources)  # kept, so that no other tensor can have their ids
        start = sum(2 * heads * size for heads, size in self.shapes[:index])
        heads, size = self.shapes[index]
        block = self._made[1][:, start:start + 2 * heads * size].unflatten(1, (2, heads, size))
        return block[:, 0], block[:, 1]

    def _forget(self, gradient: Tensor) -> None:
        """Backward has been here and freed the graph: the next call needs a new one."""
        self._made = None


@contextmanager
def _kept() -> Iterator[None]:
    """Saves tensors for backward as they are, also within an activation checkpoint, which counts those of its own block."""
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        yield


class ReparametrisedPrefix(PrefixDelta):
    """One layer's share of what a `PrefixNetwork` makes; the network is shared and kept once, by the attachment."""

    changes_at_birth = AT_BIRTH

    def __init__(self, network: PrefixNetwork, index: int) -> None:
        super().__init__()
        self._network = (network,)  # in a tuple: no submodule, it has its place among the shared modules
        self.index = index

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Made by the network."""
        return self._network[0].part(self.index)


class Prefix(Method):
    """Trainable keys and values in front of attention layers."""

    name: ClassVar[str] = "prefix"
    kinds: ClassVar[tuple[Kind, ...]] = ("attention",)
    peft_types: ClassVar[tuple[str, ...]] = (PEFT_TYPE,)
    offers: ClassVar[Mapping[str, Any] | None] = {"length": 8}

    targets: str | tuple[str, ...] = "attention"
    """Which attention modules; in encoder-decoders the self-attention of both sides."""
    length: int = Field(16, ge=1)
    """Number of keys and values in front of each layer's own."""
    init: Literal["auto", "random", "vocabulary", "text"] = "auto"
    """Initial values: small random ones; the model's own keys and values for randomly chosen tokens (vocabulary), or for `text`.
    auto: vocabulary where the model has tokens and no network makes the prefix, else random. Measured on SmolLM2-135M, loss 3.24
    without a prefix: 4.43 at birth with random ones and 2.61 after six steps, 3.17 and 1.58 with vocabulary."""
    text: str | None = None
    """With init text: its first `length` tokens, begun again where it has fewer."""
    reparametrise: int | None = Field(None, ge=1)
    """Hidden size of the network that makes the prefixes; null trains keys and values themselves."""
    first_token: Literal["auto", "sees", "alone"] = "auto"
    """Whether the first token of a causal text sees the prefix. auto: it does where the prefix is on all attention modules, as
    PEFT's; it does not where `targets` or `layers` name some."""
    position_shift: bool = False
    """Let the text begin at position `length` of a table of positions, as PEFT does: a text as prefix then stands before it."""

    @model_validator(mode="after")
    def _check_init(self) -> Prefix:
        if (self.text is not None) != (self.init == "text"):
            raise ValueError("text belongs to init: text, and init: text needs a text")
        if self.reparametrise is not None and self.init not in ("auto", "random"):
            raise ValueError("a network makes the initial keys and values, so init must be auto or random with reparametrise")
        return self

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """A prefix for each attention module, all of the same length."""
        model = _transformers(context.model)
        shapes = [attention_shape(model.get_submodule(site.path)) for site in sites]
        deltas: dict[Site, Delta] = {}
        if self.position_shift:
            deltas[_shifted_table(model)] = PositionShift(self.length)
        shared: dict[str, nn.Module] = {}
        made: dict[Site, DirectPrefix | ReparametrisedPrefix]
        if self.reparametrise is not None:
            network = PrefixNetwork(self.length, self.reparametrise, shapes, context.generator)
            made = {site: ReparametrisedPrefix(network, index) for index, site in enumerate(sites)}
            shared["network"] = network
        else:
            made = {site: DirectPrefix(*pair) for site, pair in
                    zip(sites, self._initial(model, sites, shapes, context), strict=True)}
        for delta in made.values():
            delta.spares_first = self.spares_first
        return Attachment({**deltas, **made}, shared)

    def components(self, delta: Delta) -> Components:
        """The key and the value of each place.

        Raises:
            RefusedError: keys and values come from a network of all layers, or the text's positions depend on the length.
        """
        if self.reparametrise is not None or self.position_shift:
            raise RefusedError("the places of this prefix hang together, none can be left out in one layer alone",
                               got="reparametrise" if self.reparametrise is not None else "position_shift",
                               hint="Leave that setting out.")
        return Components({"keys": 0, "values": 0})

    def resized(self, site: Site, count: int) -> dict[str, Any]:
        """The length; whether the first token sees it stays as it is, wherever the prefix is left."""
        return {"length": count, "first_token": "alone" if self.spares_first else "sees"}

    @property
    def spares_first(self) -> bool:
        """Whether the first token of a causal text does not see the prefix."""
        everywhere = self.targets == "attention" and self.layers is None
        return self.first_token == "alone" or (self.first_token == "auto" and not everywhere)

    def _initial(self, model: PreTrainedModel, sites: Sequence[Site], shapes: Sequence[tuple[int, int]],
                 context: AttachContext) -> list[tuple[Tensor, Tensor]]:
        tokens = isinstance(input_layer(model), nn.Embedding)
        if context.loading or self.init == "random" or (self.init == "auto" and not tokens):
            return [(_random(self.length, shape, context), _random(self.length, shape, context)) for shape in shapes]
        if self.init == "text":
            ids = text_tokens(context.tokenizer, str(self.text), self.length)
        else:
            ids = vocabulary_tokens(model, context.tokenizer, self.length, context.generator)
        plain = torch.contiguous_format  # kernels of optimizers go through memory in order
        return [(keys.clone(memory_format=plain), values.clone(memory_format=plain))
                for keys, values in keys_values(model, sites, ids)]

    def to_peft(self, attachment: Attachment, model: nn.Module) -> PeftPart:
        """One row of all layers' keys and values for each place; keys as PEFT's places 0, 1, ... before the text."""
        prefixes = {site: delta for site, delta in attachment.deltas.items() if isinstance(delta, PrefixDelta)}
        sites = _all_layers(_transformers(model))
        if list(prefixes) != sites:
            raise RefusedError("PEFT's prefix covers every layer", got=f"{len(prefixes)} layers", legal=f"{len(sites)} layers",
                               hint="Keep the native format.")
        _check_positions(model, self.position_shift)
        if self.spares_first:
            raise RefusedError("PEFT's prefix is seen by the first token too", got=f"first_token: {self.first_token}",
                               legal="first_token: sees", hint="Keep the native format.")
        with torch.no_grad():
            pairs = [delta.keys_values() for delta in prefixes.values()]
            keys = turned(_transformers(model), sites, [pair[0].float() for pair in pairs], self.length)
            slots = [x.detach() for key, (_, value) in zip(keys, pairs, strict=True) for x in (key, value.float())]
        if len({slot.shape for slot in slots}) > 1:
            raise RefusedError("PEFT's prefix needs layers of one shape", got=sorted({tuple(slot.shape) for slot in slots}))
        heads, size = slots[0].shape[1:]
        config = {"peft_type": PEFT_TYPE, "num_virtual_tokens": self.length, "token_dim": heads * size, "num_layers": len(sites),
                  "num_attention_heads": heads, "num_transformer_submodules": 1, "encoder_hidden_size": None,
                  "prefix_projection": False}
        return PeftPart(config, {"prompt_embeddings": torch.stack(slots, 1).flatten(1).contiguous()})

    @classmethod
    def from_peft(cls, adapter: PeftPart, model: nn.Module) -> PeftReading | None:
        """The keys and values of every layer; keys turned back where the model rotates them."""
        if "prompt_embeddings" not in adapter.tensors:
            raise CheckpointError("the adapter has no prompt_embeddings", got=sorted(adapter.tensors)[:8])
        refuse_fields(adapter.config, PEFT_READ, {"init_weights": ("zero",)})
        table = adapter.tensors["prompt_embeddings"].float()
        sites = _all_layers(_transformers(model))
        shapes = {attention_shape(model.get_submodule(site.path)) for site in sites}
        heads, size = next(iter(shapes))
        if len(shapes) > 1 or table.ndim != 2 or table.shape[1] != 2 * len(sites) * heads * size:
            raise CheckpointError("the adapter's prefix does not fit the layers of this model", got=tuple(table.shape),
                                  legal=f"{len(sites)} layers of {sorted(shapes)} (kv_heads, head_dim), keys and values")
        shift = _learned_positions(model)
        _check_positions(model, shift)
        length = len(table)
        slots = table.view(length, 2 * len(sites), heads, size).unbind(1)
        keys = turned(_transformers(model), sites, slots[::2], -length)
        state = {site.name: {"keys": key.contiguous(), "values": value.contiguous()}
                 for site, key, value in zip(sites, keys, slots[1::2], strict=True)}
        return PeftReading(cls(length=length, position_shift=shift), state, frozenset({"prompt_embeddings"}))


def _transformers(model: nn.Module) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel):
        raise RefusedError("A prefix needs a model of transformers", got=type(model).__name__)
    check_supported(model)
    return model


def _random(length: int, shape: tuple[int, int], context: AttachContext) -> Tensor:
    return torch.randn(length, *shape, generator=context.generator) * 0.02


def _shifted_table(model: PreTrainedModel) -> Site:
    table = position_table(model)
    if table is None:
        raise RefusedError("position_shift is for models with a table of positions, and this one has none",
                           got=model.config.model_type, hint="Leave it out: without it a prefix stands right before the text.")
    return table


def _learned_positions(model: nn.Module) -> bool:
    return not is_rotary(model) and position_table(model) is not None


def _check_positions(model: nn.Module, shift: bool) -> None:
    """PEFT lets the text begin at position `length`: the same as here if keys can be turned, or the table is shifted."""
    if any(path.endswith("relative_attention_bias") for path, _ in model.named_modules()):
        raise RefusedError("PEFT's prefix gets relative position biases in this family, ours has none, so they never agree",
                           got=type(model).__name__)
    if _learned_positions(model) != shift:
        raise RefusedError("PEFT lets the text begin behind the prefix, and this prefix was trained without that",
                           got="position_shift: false", legal="position_shift: true", hint="Keep the native format.")


def _all_layers(model: PreTrainedModel) -> list[Site]:
    if model.config.is_encoder_decoder:
        raise RefusedError("PEFT's prefix of encoder-decoders sits in the decoder alone; it has no counterpart here",
                           got=model.config.model_type, hint="Keep the native format.")
    return [site for site in all_sites(model) if site.kind == "attention"]
