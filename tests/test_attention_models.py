"""Whole models with deltaloom's attention: against eager attention, dense loops, prefilled caches and no cache."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from transformers import DynamicCache

from deltaloom.attention import NAME, Segments, install
from deltaloom.errors import RefusedError
from tests.dense import attention_modules, give_prefixes, padded_batch, real
from tests.toys import LAYOUTS, MORE_LAYOUTS, toy, toy_batch

ALL = (*LAYOUTS, *MORE_LAYOUTS)


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
