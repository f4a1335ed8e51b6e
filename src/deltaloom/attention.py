"""The attention function that deltaloom registers with transformers: prefix keys and values, packed segments, the faster path.

`install(model)` switches a model to it. One function serves every family that uses transformers' attention interface,
so a prefix needs no cache object and works with gradient checkpointing, packing and generation on any subset of layers.
Per call the order is: refuse what it cannot honour, split packed segments, put the prefix in front, choose the path.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from deltaloom.errors import RefusedError
from deltaloom.kernels.dropout import Front, streams
from deltaloom.kernels.dropout import dropout as seeded_dropout

NAME = "deltaloom"

# Attention as plain matmuls is taken on CPU in bf16 and fp16 up to this many keys, and for a single query at any length.
# Milliseconds of forward + backward, scaled_dot_product_attention against plain matmuls (one core with AMX, torch 2.13):
#   bf16, 16 rows, 9 heads over 3, width 64, causal: T=32 9.1|1.4, 44 18.4|3.6, 128 52|18, 256 111|55, 512 372|350, 1024 457|765
#   bf16, 32 rows, 12 heads, width 32:               T=32 23|3.3, 64 49|8.1, 128 108|26, 256 196|178, 512 (16 rows) 300|381
#   fp32, same shapes: equal up to T=64, from there on 1.5 to 3 times slower, so fp32 never takes it.
#   decoding one token, bf16, 8 rows, no mask: 64 keys 0.40|0.06, 2048 keys 14.3|0.55 (with a mask 2.7|0.66)
# At 512 the times meet, but the weights (rows * heads * T * T) are kept for backward; 256 is where the gain still pays for them.
EXPLICIT_KEYS = 256

# What a family hands to its attention function beyond the plain arguments and that changes the result: not understood here.
REFUSED_ARGUMENTS = ("cache", "sinks", "indices", "block_indices")

# Families whose only mixing of positions is self-attention through the interface and that hand keyword arguments down to it:
# each is tested to give packed segments the results of separate rows.
PACKABLE = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "olmo2", "phi", "phi3", "gpt2", "gpt_neox",
                      "bert", "distilbert", "roberta"})

_SLOT = "_deltaloom_prefix_slot"
_RECORD = "_deltaloom_record"
_HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads")


@dataclass(frozen=True)
class PrefixRows:
    """The prefix of one attention call; a row is a batch row, or a segment where rows are packed.

    keys, values: (P, kv_heads, head_dim) for all rows, or (rows, P, kv_heads, head_dim).
    visible: bool (rows, P), False where a row has no prefix or a shorter one (its values there do not matter); None: all.
    log_gate: (rows, 1, P), or (batch, T, P) one for each query, added to the prefix scores before the softmax; None: nothing.
    spared: bool (rows or 1, P), True for keys that are hidden from a query which sees no other key of the text than one: the
    first token of a causal row; None: none are.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor | None = None
    log_gate: Tensor | None = None
    spared: Tensor | None = None

    def select(self, rows: Tensor) -> PrefixRows:
        """The prefix of some rows; `rows` holds their indices, (n,)."""
        shared = self.keys.dim() == 3
        return PrefixRows(self.keys if shared else self.keys[rows], self.values if shared else self.values[rows],
                          None if self.visible is None else self.visible[rows],
                          None if self.log_gate is None else self.log_gate[rows],
                          self.spared if self.spared is None or len(self.spared) == 1 else self.spared[rows])

    def of_segments(self, group: Sequence[int], lengths: Sequence[int], longest: int) -> PrefixRows:
        """The prefix of some of the segments that one row packs; gates of single queries, (1, T, P), padded to the longest."""
        gates = self.log_gate
        if gates is None or gates.shape[1] == 1:
            return self.select(torch.tensor(group, device=self.keys.device))
        parts = gates[0].split(list(lengths))
        padded = torch.stack([F.pad(parts[index], (0, 0, 0, longest - lengths[index])) for index in group])
        without = replace(self, log_gate=None).select(torch.tensor(group, device=self.keys.device))
        return replace(without, log_gate=padded)


class PrefixSlot(ABC):
    """Where an attention module's prefix is asked for at every call, also when checkpointing calls again."""

    @abstractmethod
    def rows(self, count: int) -> PrefixRows | None:
        """The prefix for a call with `count` rows, None for none; beams of one prompt follow one another."""


def set_prefix_slot(module: nn.Module, slot: PrefixSlot | None) -> None:
    """Puts a slot on an attention module (no submodule, no entry of its state), or takes it away with None."""
    module.__dict__.pop(_SLOT, None)
    if slot is not None:
        module.__dict__[_SLOT] = slot


def prefix_slot(module: nn.Module) -> PrefixSlot | None:
    """The slot that `set_prefix_slot` put on this module."""
    return module.__dict__.get(_SLOT)


@dataclass(frozen=True)
class Segments:
    """Lengths of the rows packed one after another in a batch of one row; handed to the model as `segments=`.

    Each segment attends to itself alone. The caller gives position_ids that start anew at every segment, and no
    attention_mask. Being an argument of the forward pass, it is there again when checkpointing recomputes a layer.
    """

    lengths: tuple[int, ...]

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """position_ids (1, tokens) that start at 0 in every segment."""
        return torch.cat([torch.arange(length, device=device) for length in self.lengths])[None]

    def groups(self) -> list[list[int]]:
        """Indices of segments of similar length (within a factor of two): each group runs as one padded batch."""
        groups: dict[int, list[int]] = {}
        for index, length in enumerate(self.lengths):
            groups.setdefault((length - 1).bit_length(), []).append(index)
        return list(groups.values())


def install(model: PreTrainedModel) -> str:
    """Switches the model to deltaloom's attention; returns what it used before, for `model.set_attn_implementation`.

    Raises:
        RefusedError: a part of the model does not go through transformers' attention interface.
    """
    check_supported(model)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    return before


@contextmanager
def recording(model: PreTrainedModel, modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[tuple[Tensor, Tensor]]]]:
    """Within the block, the keys and values (batch, kv_heads, S, head_dim) of every call of these attention modules.

    They are as the attention function sees them: with rotary positions, with cached ones, without a prefix.
    """
    found: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {module: [] for module in modules}
    before = install(model)
    for module, calls in found.items():
        module.__dict__[_RECORD] = calls
    try:
        yield found
    finally:
        for module in found:
            del module.__dict__[_RECORD]
        model.set_attn_implementation(before)


def check_supported(model: PreTrainedModel) -> None:
    """Raises RefusedError if the model, or a model inside it, bypasses transformers' attention interface."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    wrong = sorted({f"{type(part).__name__} ({part.config.model_type})" for part in parts
                    if not part._can_set_attn_implementation()})
    if wrong:
        raise RefusedError("This model computes its attention itself, so no prefix and no packing can reach it",
                           got=", ".join(wrong), legal="families that use transformers' attention interface",
                           hint="Use a method that changes linear layers instead.")


def uses_interface(module: nn.Module) -> bool:
    """Whether this attention module calls the registered attention function (its class says so in its source)."""
    return _calls_interface(next(cls for cls in type(module).__mro__ if "forward" in vars(cls)))


@cache
def _calls_interface(cls: type[nn.Module]) -> bool:
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(cls)
    except (OSError, TypeError):  # a class without readable source, e.g. typed into an interpreter
        return False


def check_packable(model: PreTrainedModel) -> None:
    """Raises RefusedError unless packed segments give this family the results of separate rows."""
    check_supported(model)
    if model.config.model_type not in PACKABLE:
        raise RefusedError("Packing several rows into one is not exact, or not checked, for this family",
                           got=model.config.model_type, legal=sorted(PACKABLE), hint="Set packing: false.")


def attention_shape(module: nn.Module) -> tuple[int, int]:
    """(kv_heads, head_dim) of the keys that an attention module hands to the attention function.

    Raises:
        RefusedError: the module bypasses the interface, its keys and values differ in width (latent attention), or
            it names its sizes in none of the known ways.
    """
    own, kind = vars(module), type(module).__name__
    if not uses_interface(module):
        raise RefusedError("This attention module does not use transformers' attention interface", got=kind)
    if "qk_head_dim" in own or "v_head_dim" in own:
        raise RefusedError("A prefix needs keys and values of one width; this module compresses them", got=kind)
    config = own.get("config")
    sizes = {**(config.to_dict() if isinstance(config, PreTrainedConfig) else {}), **own}
    width = next((own[name] for name in _HEAD_WIDTHS if name in own), None)
    heads = next((sizes[name] for name in _HEAD_COUNTS if name in sizes), None)
    if not isinstance(width, int) or not isinstance(heads, int):
        raise RefusedError("This attention module does not name its number of heads and their width in a known way", got=kind,
                           legal=f"{' | '.join(_HEAD_COUNTS)} and {' | '.join(_HEAD_WIDTHS)}")
    return heads // own.get("num_key_value_groups", 1), width


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
              dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None,
              position_bias: Tensor | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
              segments: Segments | None = None, **others: Any) -> tuple[Tensor, None]:
    """The registered function: query (batch, heads, T, d), key and value (batch, kv_heads, S, d) -> (batch, T, heads, d).

    Args are transformers' own: `attention_mask` and `position_bias` are 4-D over the S keys (masks True or 0 where seen),
    `s_aux` (heads,) are sink scores, `softcap` caps scores. `others` is what families pass for other implementations.

    Raises:
        RefusedError: an argument that changes the result and is not understood, or a prefix of another shape.
    """
    refused = [name for name in REFUSED_ARGUMENTS if others.get(name) is not None]
    if refused or others.get("output_attentions"):
        raise RefusedError(f"deltaloom's attention cannot honour this argument of {type(module).__name__}",
                           got=", ".join(refused) or "output_attentions")
    record = module.__dict__.get(_RECORD)
    if record is not None:
        record.append((key, value))
    # As transformers has it: without a word from the caller or the module, attention is causal.
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = _Call(module, causal, scale, dropout, softcap, s_aux)
    slot = prefix_slot(module)
    if segments is None:
        rows = None if slot is None else slot.rows(query.shape[0])
        return call.run(query, key, value, attention_mask, position_bias, rows), None
    _check_segments(segments, query, key, position_bias, others.get("sliding_window"))
    rows = None if slot is None else slot.rows(len(segments.lengths))
    return _packed(call, query, key, value, segments, rows), None


@dataclass(frozen=True)
class _Call:
    """What is the same for all rows of one attention call."""

    module: nn.Module
    causal: bool
    scale: float
    dropout: float
    softcap: float | None
    sinks: Tensor | None

    def run(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, position_bias: Tensor | None,
            rows: PrefixRows | None) -> Tensor:
        """(batch, heads, T, d) and keys -> (batch, T, heads, d), by the faster path."""
        time = query.shape[2]
        build_causal = mask is None and self.causal and time > 1
        if build_causal and key.shape[2] > time:  # the empty tail of a static cache: its slots lie after the last query
            key, value = key[:, :, :time], value[:, :, :time]
            position_bias = None if position_bias is None else position_bias[..., :time]
        explicit = self._explicit(query, key, rows)
        if build_causal and (explicit or rows is not None):
            mask = torch.ones(time, time, dtype=torch.bool, device=query.device).tril_()[None, None]
        if rows is not None:
            key, value = _in_front(rows.keys, key), _in_front(rows.values, value)
            length = key.shape[2] if mask is None else mask.shape[-1]
            mask = _mask_with_prefix(mask, rows, query, length)
            position_bias = None if position_bias is None else F.pad(position_bias, (rows.keys.shape[-3], 0))
        if explicit:
            front = None if rows is None else Front(rows.keys.shape[-3], rows.visible)
            return self._matmuls(query, key, value, [bias for bias in (mask, position_bias) if bias is not None], front)
        causal = self.causal and rows is None  # with a prefix, the mask carries it
        return sdpa_attention_forward(self.module, query, key, value, mask, dropout=self.dropout, scaling=self.scale,
                                      is_causal=causal, position_bias=position_bias)[0]

    def _explicit(self, query: Tensor, key: Tensor, rows: PrefixRows | None) -> bool:
        if self.softcap is not None or self.sinks is not None:  # SDPA has neither
            return True
        if self.dropout > 0 and (query.device.type == "cpu" or streams()):
            return True  # on a CPU, SDPA with dropout is plain matmuls too, and draws every weight's mask one by one
        half = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
        short = query.shape[2] == 1 or key.shape[2] <= EXPLICIT_KEYS
        return half and short and query.shape[0] == key.shape[0]

    def _matmuls(self, query: Tensor, key: Tensor, value: Tensor, biases: Sequence[Tensor], front: Front | None) -> Tensor:
        """Softmax attention written out; grouped queries share their keys without copies of them.

        Scores and weights are in the dtype of the queries, the softmax computes in fp32 inside, as eager attention does.
        """
        batch, heads, time, width = query.shape
        shape = (batch, key.shape[1], heads // key.shape[1], time, key.shape[2])
        scaled = (query * self.scale).reshape(batch, shape[1], shape[2] * time, width)
        scores = torch.matmul(scaled, key.transpose(-1, -2)).view(shape)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        for bias in biases:
            scores += _by_group(_additive(bias, scores.dtype), shape[1])
        if self.sinks is not None:
            sinks = self.sinks.to(scores.dtype).reshape(1, shape[1], shape[2], 1, 1).expand(*shape[:4], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :key.shape[2]]
        if self.dropout:
            weights = seeded_dropout(weights, self.dropout, front=front)
        out = torch.matmul(weights.reshape(batch, shape[1], shape[2] * time, key.shape[2]), value)
        return out.view(batch, heads, time, value.shape[-1]).transpose(1, 2).contiguous()


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask or bias as something to add to scores; the lowest number instead of -inf keeps fully masked rows finite."""
    lowest = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)
    return mask if mask.dtype == dtype else mask.clamp_min(lowest).to(dtype)  # a wider dtype's lowest would become -inf


def _seen(mask: Tensor) -> Tensor:
    """Where a mask lets a query see a key."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _by_group(bias: Tensor, kv_heads: int) -> Tensor:
    """(batch | 1, heads | 1, T, S) -> (batch | 1, kv_heads | 1, group | 1, T, S)."""
    return bias[:, :, None] if bias.shape[1] == 1 else bias.unflatten(1, (kv_heads, -1))


def _in_front(prefix: Tensor, rest: Tensor) -> Tensor:
    """Prefix keys or values before (batch, kv_heads, S, d); rows fewer than the batch stand for beams of each row."""
    batch, kv_heads, _, width = rest.shape
    if prefix.shape[-2:] != (kv_heads, width):
        raise RefusedError("A prefix has another shape than the keys of its layer", got=tuple(prefix.shape[-2:]),
                           legal=f"(kv_heads, head_dim) = {(kv_heads, width)}")
    prefix = prefix.to(device=rest.device, dtype=rest.dtype)
    rows = prefix[None] if prefix.dim() == 3 else _per_row(prefix, batch)
    return torch.cat([rows.transpose(1, 2).expand(batch, -1, -1, -1), rest], dim=2)


def _per_row(values: Tensor, batch: int) -> Tensor:
    """Repeats rows for beam search, which lays the beams of one row side by side."""
    if batch % values.shape[0]:
        raise RefusedError("A prefix was set for another number of rows", got=batch, legal=f"a multiple of {values.shape[0]}")
    return values if batch == values.shape[0] else values.repeat_interleave(batch // values.shape[0], dim=0)


def _mask_with_prefix(mask: Tensor | None, rows: PrefixRows, query: Tensor, length: int) -> Tensor | None:
    """The mask over [prefix | keys]; None if every query may see everything."""
    width = rows.keys.shape[-3]
    # without a mask every query sees all keys: none is alone unless there is one key only
    spared = None if mask is None and length - width > 1 else rows.spared
    if rows.visible is None and rows.log_gate is None and spared is None:
        return None if mask is None else F.pad(mask, (width, 0), value=1 if mask.dtype == torch.bool else 0)
    batch = query.shape[0]
    if mask is None:
        mask = torch.ones(1, 1, 1, length - width, dtype=torch.bool, device=query.device)
    alone = None if spared is None else _seen(mask).sum(-1, keepdim=True) == 1
    front = torch.ones(batch, width, dtype=torch.bool, device=query.device)
    if rows.visible is not None:
        front = _per_row(rows.visible.to(query.device), batch)
    front = front[:, None]
    if rows.log_gate is not None or mask.dtype != torch.bool:
        front, mask = _additive(front, query.dtype), _additive(mask, query.dtype)
    if rows.log_gate is not None:
        front = front + _per_row(rows.log_gate.to(query.device, query.dtype), batch)
        front = front.clamp_min(torch.finfo(query.dtype).min)
    heads, time = mask.shape[1], max(mask.shape[2], front.shape[1])
    columns = front[:, None].expand(batch, heads, time, width)
    if alone is not None and spared is not None:
        hidden = alone & _per_row(spared.to(query.device), batch)[:, None, None]
        columns = columns.masked_fill(hidden, 0 if columns.dtype == torch.bool else torch.finfo(columns.dtype).min)
    return torch.cat([columns, mask.expand(batch, heads, time, -1)], dim=-1)


def _check_segments(segments: Segments, query: Tensor, key: Tensor, position_bias: Tensor | None, window: int | None) -> None:
    """Packing is exact only for plain self-attention without a cache, inside any sliding window."""
    tokens, longest = sum(segments.lengths), max(segments.lengths)
    if query.shape[0] != 1 or query.shape[2] != tokens or key.shape[2] != tokens:
        raise RefusedError("Packed segments need one row of exactly their tokens, and no cache",
                           got=f"{query.shape[0]} rows of {query.shape[2]} queries and {key.shape[2]} keys",
                           legal=f"1 row of {tokens} tokens")
    if position_bias is not None or (window is not None and longest > window):
        raise RefusedError("Packed segments cannot have a relative position bias, or be longer than a sliding window",
                           got=f"longest segment {longest}, window {window}")


def _packed(call: _Call, query: Tensor, key: Tensor, value: Tensor, segments: Segments, rows: PrefixRows | None) -> Tensor:
    """Runs segments as separate rows: groups of similar length as right-padded batches, put together in their order."""
    outputs: list[Tensor] = [query] * len(segments.lengths)
    parts = [x[0].transpose(0, 1).split(segments.lengths) for x in (query, key, value)]  # each (length, heads, d)
    for group in segments.groups():
        lengths = torch.tensor([segments.lengths[index] for index in group], device=query.device)
        queries, keys, values = (nn.utils.rnn.pad_sequence([part[index] for index in group], batch_first=True).transpose(1, 2)
                                 for part in parts)
        seen = torch.arange(queries.shape[2], device=query.device) < lengths[:, None]
        # Causal queries never look at the pads behind them, so their rows need no mask.
        mask = None if call.causal or bool(seen.all()) else seen[:, None, None]
        mine = None if rows is None else rows.of_segments(group, segments.lengths, queries.shape[2])
        attended = call.run(queries, keys, values, mask, None, mine)
        for index, row in zip(group, attended, strict=True):
            outputs[index] = row[:segments.lengths[index]]
    return torch.cat(outputs)[None]


AttentionInterface.register(NAME, attention)
# Without a mask function of the same name, transformers would hand over no mask at all, and say nothing.
AttentionMaskInterface.register(NAME, sdpa_mask)
