import math
import time
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.checkpoint.peft import load_peft
from deltaloom.deltas._ranked import exceptions, matches, pattern_problem
from deltaloom.deltas.dora import DoRA
from deltaloom.deltas.lora import LoRA, _singular_pair
from deltaloom.errors import RefusedError, SettingsError, TargetError
from deltaloom.sites import Site, all_sites
from deltaloom.tuned import attach
from tests.contract.cases import perturb
from tests.toys import LAYOUTS, toy, toy_batch


def ranks(tuned):
    return {site.name: (delta.down.shape[0], float(delta.scale[0])) for site, delta in tuned.pairs()}


def test_patterns_give_some_sites_other_ranks_and_scales():
    method = LoRA(rank=4, alpha=8, rank_pattern={"q": 2, r"layers\.1\.mlp.*": 3, "self_attn.v_proj": 5},
                  alpha_pattern={"down_proj": 6})
    found = ranks(attach(toy("llama"), [method]))
    for name, (rank, scale) in found.items():
        expected = 2 if "q_proj" in name else 3 if "layers.1.mlp" in name else 5 if "v_proj" in name else 4
        alpha = 6 if "down_proj" in name else 8
        assert (rank, scale) == (expected, pytest.approx(alpha / expected))


def test_the_first_pattern_that_matches_counts_and_rslora_takes_the_root():
    found = ranks(attach(toy("llama"), [LoRA(rank=4, alpha=8, rslora=True, rank_pattern={"q_proj": 2, "q": 3})]))
    assert found["model.layers.0.self_attn.q_proj"] == (2, pytest.approx(8 / math.sqrt(2)))
    assert found["model.layers.0.self_attn.k_proj"] == (4, pytest.approx(4.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_patterns_pick_what_peft_picks(layout):
    from peft.utils.other import get_pattern_key

    patterns = ["q_proj", "layers.0.self_attn.q_proj", r".*\.1\..*", "c_attn", r"^model\.layers\.0.*", "dense",
                "SelfAttention.q", "o"]
    for site in all_sites(toy(layout)):
        if site.kind == "linear" and site.part is None:
            for pattern in patterns:
                assert matches(pattern, site) == (get_pattern_key([pattern], site.path) == pattern or pattern == site.role)


def test_patterns_that_match_nothing_are_errors_all_of_them():
    """peft#3582: they were ignored without a word."""
    model = toy("llama")
    with pytest.raises(TargetError) as caught:
        attach(model, [LoRA(targets="q", rank_pattern={"zzz": 2, "k_proj": 3}, alpha_pattern={"yyy": 1.0})])
    assert all(word in str(caught.value) for word in ("'zzz'", "'k_proj'", "'yyy'", "q_proj"))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("pattern", ["(a+)+", "(.*)*", "a*b*c*d*e*", "[", "a" * 600, "(?P<x>", "x{3,5}y+z*.*.*"])
def test_patterns_that_could_run_for_ages_or_are_none(pattern):
    assert pattern_problem(pattern)
    with pytest.raises(SettingsError, match="pattern"):
        LoRA(rank_pattern={pattern: 2})


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab.()[]{}*+?|^$\\0", max_size=40))
def test_any_pattern_is_refused_or_quick(pattern):
    site = Site("a" * 60 + ".b", "linear", "role", 1, 1)
    began = time.process_time()
    if not pattern_problem(pattern):
        matches(pattern, site)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("value", [0, -1])
def test_values_of_patterns_are_checked(value):
    with pytest.raises(SettingsError, match="above 0"):
        LoRA(rank_pattern={"q": value})


@given(st.dictionaries(st.from_regex(r"[a-z]{1,3}(\.[a-z0-9]{1,3}){0,3}", fullmatch=True), st.integers(1, 4), min_size=1,
                       max_size=6))
def test_exceptions_give_back_every_value(values):
    common, patterns = exceptions(values)
    for path, value in values.items():
        site = Site(path, "linear", "", 1, 1)
        assert next((other for pattern, other in patterns.items() if matches(pattern, site)), common) == value


def test_embeddings_start_at_zero_rows_so_that_only_seen_ones_change():
    tuned = attach(toy("llama"), [LoRA(rank=2, targets="embed")])
    (_, delta), = tuned.pairs()
    assert delta.down.shape == (2, 64) and not delta.down.any() and 0.5 < delta.up.std() < 2
    batch = toy_batch("llama")
    tuned(**batch).loss.backward()
    seen = set(batch["input_ids"].flatten().tolist())
    assert {int(i) for i in delta.down.grad.abs().sum(0).nonzero()} <= seen


def test_embeddings_compute_what_dense_ones_do():
    tuned = attach(toy("llama"), [LoRA(rank=2, targets="embed")])
    perturb(tuned)
    (_, delta), = tuned.pairs()
    wrapper = tuned.model.model.embed_tokens
    ids = torch.arange(64)
    expected = wrapper.base.weight + delta.matrix().T
    torch.testing.assert_close(wrapper(ids), expected)


def test_seeds_decide_initial_values():
    first, same, other = (attach(toy("llama"), [LoRA(), DoRA(targets="mlp")], seed=seed).delta_state() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (1100, 1040)])
def test_singular_pairs_are_the_best_approximation(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape[0], 20) @ torch.randn(20, shape[1]) * 0.1 + torch.randn(shape) * 0.001
    down, up = _singular_pair(weight, 4, torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(weight)
    assert float((weight - up @ down).norm()) <= 1.02 * float(values[4:].norm())


def test_pissa_trains_from_the_singular_directions_and_changes_nothing_at_birth():
    model = toy("gpt2")
    before = model.transformer.h[0].attn.c_attn.weight.clone()
    with torch.no_grad():
        expected = model(**toy_batch("gpt2", labels=False)).logits
        tuned = attach(model, [LoRA(rank=3, init="pissa", targets="qkv")])
        assert torch.equal(tuned(**toy_batch("gpt2", labels=False)).logits, expected)
    site, delta = tuned.pairs()[0]
    product = float(delta.scale[0]) * delta.up @ delta.down
    torch.testing.assert_close(torch.linalg.svdvals(product.detach())[:3], torch.linalg.svdvals(before)[:3])
    assert site.name == "transformer.h.0.attn.c_attn"
    assert torch.equal(before, tuned.model.transformer.h[0].attn.c_attn.base.weight)


def test_pissa_needs_as_many_directions():
    with pytest.raises(RefusedError, match="rank 17"):
        attach(toy("llama"), [LoRA(rank=17, init="pissa")])


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_dora_are_those_of_the_dense_sum(layout, dtype):
    tuned = attach(toy(layout, dtype=dtype), [DoRA(rank=3, targets=["q", "down"])])
    perturb(tuned)
    for _, delta in tuned.pairs():
        dense = delta._weight().float() + delta.scale * delta.up @ delta.down
        torch.testing.assert_close(delta.norms(), dense.norm(dim=1), rtol=1e-5 if dtype is torch.float32 else 1e-2, atol=1e-5)


def test_dora_survives_rows_of_zeros():
    model = toy("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0] = 0
    tuned = attach(model, [DoRA(rank=2)])
    tuned(**toy_batch("llama")).loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in tuned.delta_parameters().values())
    perturb(tuned)
    tuned.merge()


def test_the_frozen_layer_is_no_part_of_dora():
    tuned = attach(toy("llama"), [DoRA(rank=2)])
    for _, delta in tuned.pairs():
        assert {name for name, _ in delta.named_parameters()} == {"down", "up", "magnitude"}
        assert not list(delta.children()) and set(delta.state_dict()) == {"down", "up", "magnitude"}


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("dora", [False, True])
def test_training_steps_are_those_of_peft(layout, dora, tmp_path):
    """From the same start both go the same way: forward, gradients, what is trained."""
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "bert": ["query", "intermediate.dense"]}[layout]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(toy(layout), peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=dora,
                                                                  init_lora_weights=False))
        theirs.save_pretrained(str(tmp_path))
    ours = load_peft(toy(layout), tmp_path)
    for model in (theirs, ours):
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for seed in range(4):
            model(**toy_batch(layout, seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
    with torch.no_grad():
        batch = toy_batch(layout, labels=False)
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=1e-5, atol=1e-5)
