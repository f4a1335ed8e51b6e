"""The attention function against eager attention, dense float64 attention written as loops, and prefilled caches."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as t
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from deltaloom import attention as attention_module
from deltaloom.attention import (
    NAME,
    PACKABLE,
    PrefixRows,
    PrefixSlot,
    Segments,
    attention,
    attention_shape,
    check_packable,
    check_supported,
    install,
    prefix_slot,
    set_prefix_slot,
)
from deltaloom.errors import RefusedError
from tests.toys import LAYOUTS, MORE_LAYOUTS, toy, toy_batch

ALL = (*LAYOUTS, *MORE_LAYOUTS)


# ---------------------------------------------------------------- the dumb oracle

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
                        front = front + rows.log_gate[b].double()
                    front = front.exp() if rows.visible is None else front.exp() * rows.visible[b]
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


class Owner(nn.Module):
    """Stands for an attention module of transformers."""

    def __init__(self, groups: int = 1, is_causal: bool = True) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = is_causal


def make(batch=2, heads=4, kv_heads=2, time=5, keys=None, width=8, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    keys = keys or time
    return (torch.randn(batch, heads, time, width).to(dtype), torch.randn(batch, kv_heads, keys, width).to(dtype),
            torch.randn(batch, kv_heads, keys, width).to(dtype))


def random_prefix(length=3, kv_heads=2, width=8, rows=None, seed=5) -> PrefixRows:
    generator = torch.Generator().manual_seed(seed)
    shape = (length, kv_heads, width) if rows is None else (rows, length, kv_heads, width)
    return PrefixRows(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))


def lanes(rows: int = 2, length: int = 3) -> PrefixRows:
    """The first row sees its whole prefix, the second only the last entry, further ones nothing."""
    own = random_prefix(length, rows=rows)
    visible = torch.zeros(rows, length, dtype=torch.bool)
    visible[0] = True
    visible[1, -1] = True
    return PrefixRows(own.keys, own.values, visible, torch.linspace(-1, 0, rows))


def attend(query, key, value, mask=None, rows=None, causal=True, **others) -> Tensor:
    owner = Owner(query.shape[1] // key.shape[1], causal)
    set_prefix_slot(owner, Fixed(rows))
    out, weights = attention(owner, query, key, value, mask, scaling=0.4, **others)
    assert weights is None and out.is_contiguous()
    return out


@pytest.fixture(params=["sdpa", "matmuls"])
def path(request, monkeypatch):
    matmuls = request.param == "matmuls"
    monkeypatch.setattr(attention_module._Call, "_explicit",
                        lambda self, query, key, rows: matmuls or self.softcap is not None or self.sinks is not None)
    return request.param


PADDING = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
CAUSAL_PADDED = (PADDING[:, None, None] & torch.ones(5, 5, dtype=torch.bool).tril()) | torch.eye(5, dtype=torch.bool)
NOISE = torch.randn(5, 5, generator=torch.Generator().manual_seed(3))
MASKS = {"none": None, "keys": PADDING[:, None, None], "bool": CAUSAL_PADDED,
         "float": torch.where(CAUSAL_PADDED, NOISE, torch.finfo(torch.float32).min),
         "heads": CAUSAL_PADDED.expand(2, 4, 5, 5)}
PREFIXES = {"no-prefix": None, "shared": random_prefix(), "one": random_prefix(1), "rows": random_prefix(rows=2),
            "lanes": lanes(), "gate": PrefixRows(random_prefix().keys, random_prefix().values, None, torch.tensor([-2.0, 0.5]))}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [True, False])
def test_equals_dense_attention(path, prefix, mask, causal):
    query, key, value = make()
    got = attend(query, key, value, MASKS[mask], PREFIXES[prefix], causal)
    want = dense_attention(query, key, value, MASKS[mask], scaling=0.4, causal=causal, rows=PREFIXES[prefix])
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("prefix", ["no-prefix", "shared", "lanes"])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("extra", ["position_bias", "softcap", "s_aux"])
def test_extras_equal_dense_attention(path, prefix, mask, extra):
    query, key, value = make()
    torch.manual_seed(9)
    given = {"position_bias": torch.randn(1, 4, 5, 5), "softcap": 1.5, "s_aux": torch.randn(4)}[extra]
    got = attend(query, key, value, MASKS[mask], PREFIXES[prefix], **{extra: given})
    named = {"sinks" if extra == "s_aux" else extra: given}
    want = dense_attention(query, key, value, MASKS[mask], scaling=0.4, causal=True, rows=PREFIXES[prefix], **named)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("heads, kv_heads, time, keys", [(1, 1, 1, 1), (4, 1, 3, 3), (4, 4, 1, 6), (6, 2, 1, 6), (2, 1, 2, 4)])
@pytest.mark.parametrize("prefix", [False, True])
def test_shapes(path, heads, kv_heads, time, keys, prefix):
    """One query sees all keys; more queries than one, without a mask, see their own past from the first key on."""
    query, key, value = make(3, heads, kv_heads, time, keys)
    rows = random_prefix(2, kv_heads) if prefix else None
    want = dense_attention(query, key, value, None, scaling=0.4, causal=True, rows=rows)
    torch.testing.assert_close(attend(query, key, value, None, rows).double(), want, atol=2e-6, rtol=1e-5)


def test_bf16_takes_matmuls_and_stays_within_rounding():
    query, key, value = make(2, 4, 2, 12, dtype=torch.bfloat16)
    rows = random_prefix()
    got = attend(query, key, value, None, rows)
    rounded = PrefixRows(rows.keys.bfloat16(), rows.values.bfloat16())
    want = dense_attention(query, key, value, None, scaling=0.4, causal=True, rows=rounded)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, atol=3e-2, rtol=3e-2)
    call = attention_module._Call(Owner(), True, 0.4, 0.0, None, None)
    long = query.new_zeros(2, 4, attention_module.EXPLICIT_KEYS + 1, 8)
    assert call._explicit(query, key, None) and call._explicit(long[:, :, :1], long, None)
    assert not call._explicit(long, long, None) and not call._explicit(query.float(), key.float(), None)


def test_wider_float_mask_and_fully_masked_rows_stay_finite():
    query, key, value = make(2, 4, 2, 5, dtype=torch.bfloat16)
    mask = torch.full((2, 1, 5, 5), torch.finfo(torch.float32).min)
    assert attend(query, key, value, mask).isfinite().all()
    assert attend(query, key, value, mask == 0).isfinite().all()


def test_gradients_equal_on_both_paths(monkeypatch):
    grads = []
    for explicit in (False, True):
        monkeypatch.setattr(attention_module._Call, "_explicit", lambda self, q, k, rows, explicit=explicit: explicit)
        rows = lanes()
        parts = [x.clone().requires_grad_() for x in (*make(), rows.keys, rows.values, rows.log_gate)]
        attend(*parts[:3], None, PrefixRows(parts[3], parts[4], rows.visible, parts[5])).square().sum().backward()
        grads.append([part.grad for part in parts])
    assert all(grad.abs().sum() > 0 for grad in grads[0])
    assert grads[0][3][1, :2].abs().sum() == 0, "an invisible entry got a gradient"
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_dropout_acts_on_weights():
    query, key, value = make()
    torch.manual_seed(0)
    outs = [attend(query, key, torch.ones_like(value), dropout=0.5) for _ in range(50)]
    assert outs[0].std() > 0 and abs(torch.stack(outs).mean() - 1) < 0.1


def test_beams_repeat_rows_and_other_counts_are_refused():
    query, key, value = make(4)
    rows = lanes()
    repeated = PrefixRows(*(x.repeat_interleave(2, 0) for x in (rows.keys, rows.values, rows.visible, rows.log_gate)))
    torch.testing.assert_close(attend(query, key, value, None, rows), attend(query, key, value, None, repeated))
    with pytest.raises(RefusedError, match="multiple of 2"):
        attend(*make(3), None, rows)
    with pytest.raises(RefusedError, match="another shape"):
        attend(*make(), None, random_prefix(kv_heads=4))


@pytest.mark.parametrize("name", [*attention_module.REFUSED_ARGUMENTS, "output_attentions"])
def test_arguments_that_change_the_result_are_refused(name):
    with pytest.raises(RefusedError, match=name):
        attend(*make(), **{name: torch.ones(1)})


# ---------------------------------------------------------------- models

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
            if attention_module.uses_interface(module) and "Attention" in type(module).__name__
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


@pytest.mark.parametrize("layout", ALL)
@pytest.mark.parametrize("padded", [False, True])
def test_models_without_prefix_equal_eager(layout, padded):
    model = toy(layout)
    batch = padded_batch(layout) if padded else toy_batch(layout)
    model.set_attn_implementation("eager")
    want = model(**batch)
    assert install(model) == "eager"
    got = model(**batch)
    torch.testing.assert_close(real(got.logits, batch), real(want.logits, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ALL)
def test_models_in_bf16_equal_eager_within_rounding(layout):
    exact = toy(layout)
    batch = padded_batch(layout)
    want = real(exact(**batch).logits, batch)
    model = toy(layout, dtype=torch.bfloat16)
    batch = {name: x.bfloat16() if x.is_floating_point() else x for name, x in batch.items()}
    errors = []
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        errors.append((real(model(**batch).logits, batch) - want).abs().mean().item())
    assert errors[1] < 1.5 * errors[0] + 1e-3


@pytest.mark.parametrize("layout", ALL)
@pytest.mark.parametrize("rows", [None, 3])
def test_models_with_prefix_equal_dense_attention(layout, rows):
    model = toy(layout)
    install(model)
    batch = padded_batch(layout)
    plain = real(model(**batch).logits, batch)
    slots = give_prefixes(model, rows, cross=True)
    got = real(model(**batch).logits, batch)
    model.set_attn_implementation("oracle")
    want = real(model(**batch).logits, batch)
    assert all(len(slot.counts) == 2 for slot in slots)
    assert (got - plain).abs().max() > 1e-2, "the prefix changed nothing"
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["llama", "gpt2", "qwen3", "phi", "gemma"])
@pytest.mark.parametrize("left", [False, True])
def test_prefix_equals_a_prefilled_cache(layout, left):
    """Keys of a prefix have no position: the same as a cache that holds them, with real tokens at 0, 1, ..."""
    model = toy(layout)
    batch = padded_batch(layout, left)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    slots = give_prefixes(model)
    cache = DynamicCache()
    for layer, slot in enumerate(slots):
        cache.update(*(x.transpose(0, 1).expand(3, -1, -1, -1) for x in (slot.given.keys, slot.given.values)), layer)
    mask = torch.cat([torch.ones(3, 3, dtype=torch.long), batch["attention_mask"]], dim=1)
    model.set_attn_implementation("eager")
    want = model(batch["input_ids"], attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    install(model)
    got = model(batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions).logits
    torch.testing.assert_close(real(got, batch), real(want, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["llama", "gpt2", "t5", "bart", "gemma"])
@pytest.mark.parametrize("only", [slice(None), slice(0, 1)])
def test_cached_steps_equal_one_pass(layout, only):
    """Token by token, in chunks, and in one pass: the prefix is in front on each call and never in the cache."""
    model = toy(layout)
    install(model)
    give_prefixes(model, only=only)
    ids = toy_batch(layout, labels=False)["input_ids"]
    source = {"input_ids": ids} if model.config.is_encoder_decoder else {}
    name = "decoder_input_ids" if source else "input_ids"
    want = model(**source, **{name: ids}).logits
    for sizes in ([1] * 7, [4, 3], [1, 6]):
        cache, pieces = None, []
        for chunk in ids.split(sizes, dim=1):
            out = model(**source, **{name: chunk}, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
        assert cache.get_seq_length() == 7
        torch.testing.assert_close(torch.cat(pieces, 1), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}])
def test_generate_with_prefix_equals_no_cache(layout, settings):
    model = toy(layout)
    install(model)
    give_prefixes(model, rows=3)
    batch = padded_batch(layout, left=True, labels=False)
    common = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **settings}
    got = model.generate(**batch, **common)
    want = model.generate(**batch, **{**common, "use_cache": False, "cache_implementation": None})
    assert torch.equal(got, want)


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert", "t5"])
def test_checkpointing_gives_the_same_gradients(layout):
    grads = []
    for checkpointing in (False, True):
        model = toy(layout).train()
        model.requires_grad_(False)
        install(model)
        slots = give_prefixes(model, rows=3)
        if checkpointing:
            model.activation_checkpointing_enable()
        for slot in slots:
            slot.given.keys.requires_grad_()
            slot.given.values.requires_grad_()
        model(**padded_batch(layout)).loss.backward()
        assert all(len(slot.counts) == 1 + checkpointing for slot in slots)
        grads.append([x.grad for slot in slots for x in (slot.given.keys, slot.given.values)])
    for one, other in zip(*grads, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other)


def test_sliding_window_keeps_the_prefix_in_sight():
    config = t.MistralConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, sliding_window=3)
    torch.manual_seed(0)
    model = t.MistralForCausalLM(config).eval()
    ids = toy_batch("llama", labels=False)["input_ids"]
    model.set_attn_implementation("eager")
    want = model(ids).logits
    install(model)
    torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)
    give_prefixes(model)
    got = model(ids).logits
    assert (got - want)[:, -1].abs().max() > 1e-4
    out, pieces = None, []
    for step in ids.split(1, dim=1):
        out = model(step, past_key_values=None if out is None else out.past_key_values, use_cache=True)
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), got, atol=1e-5, rtol=1e-5)
    model.set_attn_implementation("oracle")
    torch.testing.assert_close(got, model(ids).logits, atol=1e-5, rtol=1e-5)
    install(model)
    with pytest.raises(RefusedError, match="window"):
        model(ids[:1], segments=Segments((4, 3)), position_ids=Segments((4, 3)).positions())


@pytest.mark.parametrize("family", ["Gemma2", "GptOss"])
def test_softcap_and_sinks_equal_eager(family):
    config = getattr(t, f"{family}Config")(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=4,
                                           num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    model = getattr(t, f"{family}ForCausalLM")(config).eval()
    ids = toy_batch("llama", labels=False)["input_ids"]
    with torch.no_grad():
        for module in attention_modules(model):
            if "sinks" in dict(module.named_parameters()):
                module.sinks.normal_()
        model.set_attn_implementation("eager")
        want = model(ids).logits
        install(model)
        torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- packed segments

DECODER = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OTHERS = {
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**DECODER)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**DECODER)),
    "smollm3": lambda: t.SmolLM3ForCausalLM(t.SmolLM3Config(**DECODER)),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**DECODER)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, hidden_dropout=0.0)),
    "bert": lambda: t.BertForTokenClassification(t.BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)),
    "distilbert": lambda: t.DistilBertForTokenClassification(t.DistilBertConfig(
        vocab_size=64, dim=16, hidden_dim=24, n_layers=2, n_heads=4)),
    "roberta": lambda: t.RobertaForTokenClassification(t.RobertaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)),
}
LENGTHS = (3, 5, 1, 2, 9, 4)


def packable(family: str) -> nn.Module:
    torch.manual_seed(0)
    return OTHERS[family]().eval() if family in OTHERS else toy(family)


@pytest.mark.parametrize("family", sorted(PACKABLE))
@pytest.mark.parametrize("prefix", [False, True])
def test_packed_segments_equal_separate_rows(family, prefix):
    model = packable(family)
    check_packable(model)
    install(model)
    segments = Segments(LENGTHS)
    slots = give_prefixes(model, rows=len(LENGTHS)) if prefix else []
    rows = [slot.given for slot in slots]
    ids = torch.randint(3, 64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    positions = segments.positions()
    if family == "roberta":
        positions = positions + model.config.pad_token_id + 1
    named = {} if family == "distilbert" else {"position_ids": positions}
    if family == "distilbert":  # takes no position_ids: its embeddings are given with their positions
        table = model.distilbert.embeddings
        embedded = table.LayerNorm(table.word_embeddings(ids) + table.position_embeddings(positions))
        handle = table.register_forward_hook(lambda module, args, out: embedded if out.shape[1] == ids.shape[1] else out)
    weights = torch.randn(ids.shape[1], generator=torch.Generator().manual_seed(2))

    model.zero_grad()
    packed = model(ids, **named, segments=segments).logits
    (packed[0].logsumexp(-1) * weights).sum().backward()
    packed_grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if family == "distilbert":
        handle.remove()

    model.zero_grad()
    separate = []
    for index, chunk in enumerate(ids[0].split(LENGTHS)):
        for slot, all_rows in zip(slots, rows, strict=True):
            slot.given = all_rows.select(torch.tensor([index]))
        separate.append(model(chunk[None]).logits[0])
    separate_logits = torch.cat(separate)
    (separate_logits.logsumexp(-1) * weights).sum().backward()
    torch.testing.assert_close(packed[0], separate_logits, atol=1e-5, rtol=1e-5)
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(packed_grads[name], p.grad, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_packed_segments_under_checkpointing_and_in_bf16():
    segments = Segments(LENGTHS)
    ids = torch.randint(3, 64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    grads = []
    for checkpointing in (False, True):
        model = toy("llama", dtype=torch.bfloat16).train()
        install(model)
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, position_ids=segments.positions(), segments=segments).logits.float().square().sum().backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*grads)


def test_segments_are_refused_where_they_cannot_be_exact():
    for layout in ("t5", "bart", "vit"):
        with pytest.raises(RefusedError, match=model_type(layout)):
            check_packable(toy(layout))
    model = toy("llama")
    install(model)
    ids = torch.ones(1, 7, dtype=torch.long)
    for bad in (ids.expand(2, -1), ids[:, :6]):
        with pytest.raises(RefusedError, match="one row"):
            model(bad, segments=Segments((4, 3)))


def model_type(layout: str) -> str:
    return toy(layout).config.model_type


def test_groups_hold_every_segment_once_with_similar_lengths():
    lengths = (1, 2, 3, 4, 5, 8, 9, 64, 1000, 40)
    groups = Segments(lengths).groups()
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        sizes = [lengths[index] for index in group]
        assert max(sizes) <= 2 * min(sizes)


# ---------------------------------------------------------------- families, slots, configurations

@pytest.mark.parametrize("family, settings", [
    ("Bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2}),
    ("GPTJ", {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}),
    ("Mpt", {"d_model": 16, "n_layers": 1, "n_heads": 2}),
    ("Falcon", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}),
    ("CodeGen", {"n_embd": 16, "n_layer": 1, "n_head": 4, "rotary_dim": 2}),
    ("DebertaV2", {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}),
    ("GPTNeo", {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}),
    ("XLNet", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}),
])
def test_families_that_bypass_the_interface_are_refused_by_name(family, settings):
    model = getattr(t, f"{family}Model")(getattr(t, f"{family}Config")(vocab_size=64, **settings))
    before = model.config._attn_implementation
    with pytest.raises(RefusedError, match=model.config.model_type):
        install(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("family", [*ALL, *sorted(PACKABLE - set(ALL)), "Gemma2", "GptOss", "Gemma3"])
def test_attention_shape_is_what_the_keys_have(family, monkeypatch):
    if family in ALL or family in PACKABLE:
        model = toy(family) if family in ALL else packable(family)
    else:
        kind = "Gemma3Text" if family == "Gemma3" else family
        model = getattr(t, f"{family}ForCausalLM")(getattr(t, f"{kind}Config")(**{**DECODER, "head_dim": 8}))
    seen = {}

    def record(module, query, key, value, *args, **kwargs):
        seen[module] = (key.shape[1], key.shape[3])
        return attention(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("recorder", record)
    AttentionMaskInterface.register("recorder", sdpa_mask)
    model.set_attn_implementation("recorder")
    model(**toy_batch(family if family in ALL else "llama", labels=family in ("t5", "bart")))
    assert len(seen) == len(attention_modules(model, cross=True)) > 0
    assert all(attention_shape(module) == shape for module, shape in seen.items())


def test_attention_shape_refuses_what_has_none():
    with pytest.raises(RefusedError, match="Linear"):
        attention_shape(nn.Linear(2, 2))
    config = t.DeepseekV3Config(**{**DECODER, "num_key_value_heads": 4}, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
                                v_head_dim=4, qk_nope_head_dim=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
                                topk_group=1, first_k_dense_replace=2)
    with pytest.raises(RefusedError, match="one width"):
        attention_shape(t.DeepseekV3ForCausalLM(config).model.layers[0].self_attn)


def test_slots_are_no_part_of_the_state_and_follow_copies(tmp_path):
    model = toy("llama")
    names = set(model.state_dict())
    install(model)
    slots = give_prefixes(model)
    first = model.model.layers[0].self_attn
    assert set(model.state_dict()) == names and prefix_slot(first) is slots[0]
    copied = copy.deepcopy(model)
    assert prefix_slot(copied.model.layers[0].self_attn) is not slots[0]
    set_prefix_slot(first, None)
    assert prefix_slot(first) is None
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


def test_inner_model_that_bypasses_is_refused():
    bloom = t.BloomModel(t.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2))
    model = toy("llama")
    model.extra = bloom
    with pytest.raises(RefusedError, match="BloomModel"):
        check_supported(model)
