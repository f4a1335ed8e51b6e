import copy

import pytest
import torch

from deltaloom.deltas.base import Delta
from deltaloom.deltas.bitfit import BitFit
from deltaloom.deltas.bottleneck import Bottleneck
from deltaloom.deltas.dora import DoRA
from deltaloom.deltas.full import Full
from deltaloom.deltas.ia3 import IA3
from deltaloom.deltas.lora import LoRA
from deltaloom.deltas.norms import Norms
from deltaloom.errors import RefusedError
from deltaloom.tuned import attach
from deltaloom.tuned.merging import logits_error
from tests.toys import LAYOUTS, toy, toy_batch

COMPOSITIONS = {
    "lora": [LoRA(rank=3, targets="all")],
    "pissa": [LoRA(rank=3, init="pissa")],
    "dora": [DoRA(rank=3)],
    "parts": [LoRA(rank=2, targets=("q", "v"))],
    "ia3": [IA3()],
    "bitfit": [BitFit()],
    "norms": [Norms()],
    "full": [Full(targets="all-linear")],
    "lora then ia3": [LoRA(rank=2), IA3()],
    "ia3 then lora": [IA3(), LoRA(rank=2)],
    "lora, ia3, bitfit, dora": [LoRA(rank=2), IA3(), BitFit(), DoRA(rank=2, targets="mlp")],
    "lora over full": [LoRA(rank=2, targets="mlp"), Full(targets="mlp")],
}


def shaken(tuned, size=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.delta_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return tuned


def logits(tuned, layout):
    with torch.no_grad():
        return tuned(**toy_batch(layout, labels=layout == "t5")).logits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_merged_equals_unmerged_and_unmerging_is_bit_exact(layout, name):
    model = toy(layout)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    parameters = {key: id(parameter) for key, parameter in model.named_parameters(remove_duplicate=False)}
    bare = logits(model, layout)
    tuned = shaken(attach(model, COMPOSITIONS[name]))
    apart = logits(tuned, layout)
    assert (apart - bare).abs().max() > 1e-3
    facts = tuned.merge()
    assert facts.tensors > 0 and facts.max_error < 1e-6 and facts.relative_error < 1e-7
    torch.testing.assert_close(logits(tuned, layout), apart, rtol=1e-4, atol=1e-4)
    with tuned.bare() as merged:
        torch.testing.assert_close(logits(merged, layout), apart, rtol=1e-4, atol=1e-4)
    tuned.unmerge()
    assert torch.equal(logits(tuned, layout), apart)
    model = tuned.detach()
    assert {key: id(parameter) for key, parameter in model.named_parameters(remove_duplicate=False)} == parameters
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounding_error_is_reported_and_unmerging_16_bits_is_exact(dtype):
    model = toy("llama", dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    tuned = shaken(attach(model, [LoRA(rank=3, targets="q")]), 0.05)
    exact = {site.path: delta.fold(before[f"{site.path}.weight"].double(), None)[0] for site, delta in tuned.pairs()}
    facts = tuned.merge()
    with tuned.bare() as merged:
        gaps = [(merged.get_submodule(path).weight.double() - weight).abs().max() for path, weight in exact.items()]
        changes = [(weight - before[f"{path}.weight"].double()).square().sum() for path, weight in exact.items()]
        rounding = [(merged.get_submodule(path).weight.double() - weight).square().sum() for path, weight in exact.items()]
    assert facts.max_error == pytest.approx(float(max(gaps)), rel=1e-9)
    assert facts.lost == pytest.approx(float((sum(rounding) / sum(changes)).sqrt()), rel=1e-6)
    assert 0 < facts.relative_error < facts.lost < 1
    tuned.unmerge()
    assert all(torch.equal(tensor, before[key]) for key, tensor in tuned.detach().state_dict().items())


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_changing_one_side_of_tied_embeddings_unties_and_says_so(layout):
    model = toy(layout)
    assert model.config.tie_word_embeddings == (model.lm_head.weight is model.get_input_embeddings().weight)
    if not model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.get_input_embeddings().weight
    head = model.lm_head.weight.clone()
    tuned = shaken(attach(model, [LoRA(rank=2, targets="embed")]))
    apart = logits(tuned, layout)
    facts = tuned.merge()
    assert any("untied" in note for note in facts.notes)
    assert tuned.config.tie_word_embeddings is False
    with tuned.bare() as merged:
        assert torch.equal(merged.lm_head.weight, head)
    torch.testing.assert_close(logits(tuned, layout), apart, rtol=1e-4, atol=1e-4)
    tuned.unmerge()
    model = tuned.detach()
    assert model.config.tie_word_embeddings is True and model.lm_head.weight is model.get_input_embeddings().weight


def test_both_sides_trained_as_one_tensor_stay_tied():
    model = toy("gpt2")
    tuned = shaken(attach(model, [Full(targets=("wte", "lm_head"))]))
    facts = tuned.merge()
    with tuned.bare() as merged:
        assert merged.lm_head.weight is merged.transformer.wte.weight
    assert facts.notes == () and tuned.config.tie_word_embeddings is True


def test_a_new_bias_is_noted():
    tuned = shaken(attach(toy("llama"), [BitFit(targets="q")]))
    apart = logits(tuned, "llama")
    facts = tuned.merge()
    assert len(facts.notes) == 2 and "bias" in facts.notes[0]
    torch.testing.assert_close(logits(tuned, "llama"), apart, rtol=1e-5, atol=1e-5)
    tuned.unmerge()
    with tuned.bare() as model:
        assert model.model.layers[0].self_attn.q_proj.bias is None


def test_a_bottleneck_refuses_before_anything_changes():
    model = toy("llama")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tuned = attach(model, [LoRA(rank=2), Bottleneck()])
    shaken(tuned)
    with pytest.raises(RefusedError, match="cannot be merged"):
        tuned.merge()
    assert tuned.merged is None
    assert all(torch.equal(tensor, before[key]) for key, tensor in tuned.detach().state_dict().items())


class Overflows(Delta):
    def fold(self, weight, bias):
        return weight * 1e30, bias


def test_a_layer_that_fails_late_leaves_the_earlier_ones_alone():
    """peft#3705: a failing safe_merge had changed the weight."""
    model = toy("llama", dtype=torch.float16)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tuned = shaken(attach(model, [LoRA(rank=2)]))
    last = [module for module in model.modules() if type(module).__name__ == "Adapted"][-1]
    last.add("default", last.items("default")[0][0], Overflows())
    with pytest.raises(RefusedError, match="finite"):
        tuned.merge()
    assert tuned.merged is None
    assert all(torch.equal(tensor, before[key]) for key, tensor in tuned.detach().state_dict().items())


def test_lanes_and_merging():
    """peft#3756: merging one of several active adapters switched the others off without a word."""
    tuned = shaken(attach(toy("llama"), [LoRA(rank=2)], "a"))
    tuned.add("b", [LoRA(rank=2)])
    tuned.use(["a", "b", None])
    with pytest.raises(RefusedError, match="only one"):
        tuned.merge()
    with pytest.raises(RefusedError, match="no delta is merged"):
        tuned.unmerge()
    tuned.merge("a")
    for lanes in ("b", None, ["a", "b", "a"]):
        with pytest.raises(RefusedError, match="merged"):
            tuned.use(lanes)
    for refused in (lambda: tuned.merge("b"), tuned.detach, lambda: tuned.remove("a"), lambda: tuned.add("c", [LoRA()])):
        with pytest.raises(RefusedError, match="merged"):
            refused()
    tuned.unmerge()
    tuned.use("b")


@torch.no_grad()
def test_logits_error_is_measured_and_leaves_the_state_alone():
    tuned = shaken(attach(toy("llama", dtype=torch.bfloat16), [LoRA(rank=2)]))
    batch = toy_batch("llama", labels=False)
    apart = tuned(**batch).logits
    error = logits_error(tuned, batch)
    assert tuned.merged is None and torch.equal(tuned(**batch).logits, apart)
    tuned.merge()
    together = tuned(**batch).logits
    assert error == pytest.approx(float((apart.double() - together.double()).abs().max()))
    assert logits_error(tuned, batch) == error and tuned.merged == "default"


@pytest.mark.parametrize("key", ["bias", "weight"])
def test_one_value_that_is_not_finite_stops_a_merge(key):
    """peft#2486, #3741: the check of biases lacked `.all()`."""
    model = toy("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = shaken(attach(model, [Full(targets="query")]))
    spoiled = list(tuned.pairs()[-1][1].override()[key].view(-1))[-1]
    with torch.no_grad():
        spoiled.fill_(float("nan"))
    with pytest.raises(RefusedError, match=f"query.{key}"):
        tuned.merge()
    assert tuned.merged is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.detach().state_dict().items())


def test_lanes_at_different_layers_merge_one_by_one():
    """peft#3574: a KeyError where one of several deltas does not have every norm."""
    tuned = shaken(attach(toy("llama"), [Norms(targets="input_layernorm")], "a"), seed=1)
    tuned.add("b", [Norms(targets=("post_attention_layernorm", "model.norm"))])
    shaken(tuned, seed=2)
    for name in ("a", "b", "a"):
        tuned.use(name)
        apart = logits(tuned, "llama")
        tuned.merge()
        torch.testing.assert_close(logits(tuned, "llama"), apart, rtol=1e-4, atol=1e-4)
        tuned.unmerge()
        assert torch.equal(logits(tuned, "llama"), apart)


def test_several_magnitudes_at_one_layer_merge_exactly():
    """peft#3608: several DoRA adapters, merged, were off by 2.57 to 13.86 %."""
    tuned = shaken(attach(toy("llama"), [DoRA(rank=2), LoRA(rank=2), DoRA(rank=3)]))
    apart = logits(tuned, "llama")
    tuned.merge()
    torch.testing.assert_close(logits(tuned, "llama"), apart, rtol=1e-4, atol=1e-4)


def test_scales_of_zero_come_back():
    """peft#3216: unmerging divided by (scale + 1e-8)."""
    model = toy("gpt2")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tuned = attach(model, [IA3()])
    with torch.no_grad():
        for parameter in tuned.delta_parameters().values():
            parameter.zero_()
    tuned.merge()
    tuned.unmerge()
    assert all(torch.equal(tensor, before[key]) for key, tensor in tuned.detach().state_dict().items())
