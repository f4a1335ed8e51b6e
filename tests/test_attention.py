"""The attention function against dense float64 attention written as loops; slots, shapes and refusals."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers as t
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from deltaloom import attention as attention_module
from deltaloom.attention import (
    NAME,
    PACKABLE,
    PrefixRows,
    attention,
    attention_shape,
    check_supported,
    install,
    prefix_slot,
    recording,
    set_prefix_slot,
)
from deltaloom.errors import RefusedError
from tests.dense import Fixed, attention_modules, dense_attention, give_prefixes, random_prefix
from tests.test_attention_packed import DECODER, packable
from tests.toys import LAYOUTS, MORE_LAYOUTS, toy, toy_batch

ALL = (*LAYOUTS, *MORE_LAYOUTS)


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


def lanes(rows: int = 2, length: int = 3) -> PrefixRows:
    """The first row sees its whole prefix, the second only the last entry, further ones nothing."""
    own = random_prefix(length, rows=rows)
    visible = torch.zeros(rows, length, dtype=torch.bool)
    visible[0] = True
    visible[1, -1] = True
    return PrefixRows(own.keys, own.values, visible, torch.linspace(-1, 0, rows)[:, None, None].repeat(1, 1, length))


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
            "lanes": lanes(), "spared": replace(random_prefix(), spared=torch.tensor([[True] * 3])),
            "some-spared": replace(lanes(), spared=torch.tensor([[True, True, False], [True, False, True]])),
            "gate": replace(random_prefix(), log_gate=torch.tensor([-2.0, 0.5])[:, None, None].repeat(1, 1, 3)),
            "gates": replace(random_prefix(), log_gate=torch.linspace(-2, 1, 30).view(2, 5, 3)),
            "gates-spared": replace(random_prefix(), log_gate=torch.linspace(-2, 1, 30).view(2, 5, 3),
                                    spared=torch.tensor([[True, False, True]]))}


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
@pytest.mark.parametrize("prefix", [False, True, "spared"])
def test_shapes(path, heads, kv_heads, time, keys, prefix):
    """One query sees all keys; more queries than one, without a mask, see their own past from the first key on."""
    query, key, value = make(3, heads, kv_heads, time, keys)
    rows = random_prefix(2, kv_heads) if prefix else None
    if prefix == "spared":
        rows = replace(rows, spared=torch.tensor([[True, False]]))
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


def test_recording_gives_the_keys_and_puts_everything_back():
    model = toy("llama")
    modules = attention_modules(model)
    before = model.config._attn_implementation
    with recording(model, modules) as found:
        cache = model(**toy_batch("llama", labels=False), use_cache=True).past_key_values
    assert model.config._attn_implementation == before
    for layer, module in zip(cache.layers, modules, strict=True):
        (keys, values), = found[module]
        assert torch.equal(keys, layer.keys) and torch.equal(values, layer.values)
    install(model)
    model(**toy_batch("llama"))
    assert all(len(calls) == 1 for calls in found.values())
