"""Oracles and helpers for tests of attention: dense float64 attention written as loops, fixed prefixes on every layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from deltaloom.attention import PrefixRows, PrefixSlot, attention_shape, prefix_slot, set_prefix_slot, uses_interface
from tests.toys import toy_batch


def dense_attention(query, key, value, mask, *, scaling, causal, position_bias=None, softcap=None, sinks=None, rows=None):
    """Loops over rows, heads and queries in float64; a weight is exp(score) over the sum of all, nothing clever."""
    batch, heads, time, _ = query.shape
    group = heads // key.shape[1]
    out = torch.zeros(batch, time, heads, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            keys, values = key[b, h // group].double(), value[b, h // group].double()
            for q in range(time):
                scores = keys @ query[b, h, q].double() * scaling
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if position_bias is not None:
                    scores = scores + position_bias[min(b, position_bias.shape[0] - 1), h, q].double()
                if mask is not None:
                    seen = mask[min(b, len(mask) - 1), min(h, mask.shape[1] - 1), min(q, mask.shape[2] - 1)]
                    scores = torch.where(seen, scores, -torch.inf) if mask.dtype == torch.bool else scores + seen.double()
                elif causal and time > 1:
                    scores = scores[:q + 1]
                weights, seen_values = scores.exp(), values[:len(scores)]
                if rows is not None:
                    own = PrefixRows(*(x if x.dim() == 3 else x[b] for x in (rows.keys, rows.values)))
                    front = (own.keys[:, h // group].double() @ query[b, h, q].double()) * scaling
                    if softcap is not None:
                        front = softcap * torch.tanh(front / softcap)
                    if rows.log_gate is not None:
                        front = front + rows.log_gate[b, min(q, rows.log_gate.shape[1] - 1)].double()
                    front = front.exp() if rows.visible is None else front.exp() * rows.visible[b]
                    if rows.spared is not None and int((weights > 0).sum()) == 1:  # it sees one key of the text alone
                        front = front * ~rows.spared[min(b, len(rows.spared) - 1)]
                    weights = torch.cat([front, weights])
                    seen_values = torch.cat([own.values[:, h // group].double(), seen_values])
                total = weights.sum() + (0 if sinks is None else sinks[h].double().exp())
                out[b, q, h] = (weights[:, None] * seen_values).sum(0) / total
    return out


class Fixed(PrefixSlot):
    """A slot that always gives the same rows."""

    def __init__(self, rows: PrefixRows | None) -> None:
        self.given = rows
        self.counts: list[int] = []

    def rows(self, count: int) -> PrefixRows | None:
        self.counts.append(count)
        return self.given


def random_prefix(length=3, kv_heads=2, width=8, rows=None, seed=5) -> PrefixRows:
    generator = torch.Generator().manual_seed(seed)
    shape = (length, kv_heads, width) if rows is None else (rows, length, kv_heads, width)
    return PrefixRows(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))


def oracle_function(module, query, key, value, attention_mask, scaling=None, is_causal=None, position_bias=None,
                    softcap=None, **_):
    slot = prefix_slot(module)
    causal = module.is_causal if is_causal is None else is_causal
    out = dense_attention(query, key, value, attention_mask, scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
                          causal=causal, position_bias=position_bias, softcap=softcap, rows=slot and slot.rows(query.shape[0]))
    return out.to(query.dtype), None


AttentionInterface.register("oracle", oracle_function)
AttentionMaskInterface.register("oracle", sdpa_mask)


def attention_modules(model: nn.Module, cross: bool = False) -> list[nn.Module]:
    """Self-attention modules (and cross-attention) in the order of the model."""
    return [module for name, module in model.named_modules()
            if uses_interface(module) and "Attention" in type(module).__name__
            and (cross or not any(word in name for word in ("EncDecAttention", "encoder_attn")))]


def give_prefixes(model: nn.Module, rows: int | None = None, cross: bool = False, only: slice = slice(None)) -> list[Fixed]:
    slots = []
    for index, module in enumerate(attention_modules(model, cross)[only]):
        kv_heads, width = attention_shape(module)
        slot = Fixed(random_prefix(3, kv_heads, width, rows, seed=index))
        set_prefix_slot(module, slot)
        slots.append(slot)
    return slots


def padded_batch(layout: str, left: bool = False, labels: bool = True) -> dict[str, Tensor]:
    batch = toy_batch(layout, labels=labels)
    if layout == "vit":
        return batch
    mask = torch.ones_like(batch["input_ids"])
    if left:
        mask[1, :3] = 0
    else:
        mask[1, -3:] = 0
    batch["attention_mask"] = mask
    return batch


def real(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The logits of real tokens: what pads see differs between implementations and never matters."""
    same = "attention_mask" in batch and logits.shape[:2] == batch["attention_mask"].shape
    return logits[batch["attention_mask"].bool()] if same else logits
