"""Removing neurons and heads: the same as setting them to zero, and a plain model of transformers afterwards."""

import pytest
import torch
from torch import nn

from deltaloom.compact.face import affine_weight
from deltaloom.compress._calibration import calibrated
from deltaloom.compress._prune import importances, refitted
from deltaloom.compress._units import Cut, heads_of, neurons_of, shrink
from deltaloom.compress.base import weight_bytes
from deltaloom.compress.prune_heads import PruneHeads
from deltaloom.compress.prune_neurons import PruneNeurons
from deltaloom.compress.quantise import Quantise
from deltaloom.errors import RefusedError
from deltaloom.sites import all_sites
from tests.compress.pieces import batches, compressed, meta, outputs, shapes, work
from tests.toys import toy, toy_batch

NARROWED = ("llama", "gpt2", "bert", "t5", "phi3", "qwen3", "gemma", "phi", "distilbert", "vit", "bart", "llama-classifier")
HEADED = ("llama", "t5", "phi3", "qwen3", "gemma", "phi", "llama-classifier")
CASES = [(PruneNeurons, layout) for layout in NARROWED] + [(PruneHeads, layout) for layout in HEADED]
WITHOUT = ("gpt2", "bert", "bart", "distilbert", "vit", "roberta")


def reading(model, units):
    paths = {each.leave for each in units}
    return [site for site in all_sites(model) if site.kind == "linear" and site.part is None and site.path in paths]


def whole_numbers(model):
    """path -> what a module remembers of sizes."""
    return {path: {key: value for key, value in vars(module).items() if type(value) is int}
            for path, module in model.named_modules()}


def choices(units, count, seed=0):
    """Random units to keep, alike where they have to be."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for each in units:
        if each.together not in found:
            found[each.together] = torch.randperm(each.count, generator=generator)[:count].sort().values
    return {each.leave: found[each.together] for each in units}


@pytest.mark.parametrize(("cls", "layout"), CASES)
def test_removing_units_is_setting_them_to_zero(cls, layout, tmp_path):
    pruner = cls(share=0.5)
    model, zeroed = toy(layout), toy(layout)
    units = pruner.units(model)
    kept = choices(units, pruner.kept_count(units[0]))
    shrink(model, units, Cut(kept, pruner.numbers(model, units)))
    with torch.no_grad():
        for each in units:  # what the removed units put out reaches nothing
            gone = torch.ones(each.count * each.width, dtype=torch.bool)
            gone[each.columns(kept[each.leave])] = False
            affine_weight(zeroed.get_submodule(each.leave))[:, gone] = 0
    expected = outputs(zeroed, layout)
    torch.testing.assert_close(outputs(model, layout), expected, rtol=1e-4, atol=1e-5)
    assert weight_bytes(model) < weight_bytes(zeroed)
    model.save_pretrained(tmp_path / "m")
    again = type(model).from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(outputs(again, layout), expected, rtol=1e-4, atol=1e-5)
    assert whole_numbers(model) == whole_numbers(again)


@pytest.mark.parametrize(("cls", "layout"), CASES)
def test_shapes_are_those_of_the_sketch_and_the_model_still_runs(cls, layout):
    done, facts = compressed(cls(share=0.4), layout)
    assert outputs(done.model, layout).isfinite().all()
    assert facts.figures["units_after"] < facts.figures["units_before"]
    assert all(record["kept"] < record["units"] for record in facts.layers)
    if done.model.can_generate() and layout != "vit":
        inputs = toy_batch(layout, labels=False)
        done.model.generate(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=3, do_sample=False)


def test_grouped_queries_stay_with_their_keys_and_values():
    model = toy("llama")  # 4 query heads of width 4, 2 heads of keys and values
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    units = heads_of(model)
    kept = {each.leave: torch.tensor([1]) for each in units}
    shrink(model, units, Cut(kept, PruneHeads(share=0.5).numbers(model, units)))
    after, at = model.state_dict(), "model.layers.0.self_attn."
    assert torch.equal(after[at + "q_proj.weight"], before[at + "q_proj.weight"][8:])
    assert torch.equal(after[at + "k_proj.weight"], before[at + "k_proj.weight"][4:])
    assert torch.equal(after[at + "o_proj.weight"], before[at + "o_proj.weight"][:, 8:])
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (2, 1, 4)


def test_blocks_that_read_one_table_by_head_keep_the_same_heads():
    done = work("t5")
    before = done.model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.clone()
    PruneHeads(share=0.5).apply(done)
    after = done.model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    kept = [column for column in range(4) if any(torch.equal(before[:, column], after[:, own]) for own in range(2))]
    assert len(kept) == 2
    for block, original in zip(done.model.encoder.block, toy("t5").encoder.block, strict=True):
        rows = original.layer[0].SelfAttention.q.weight.reshape(4, 4, 16)[kept].reshape(8, 16)
        assert torch.equal(block.layer[0].SelfAttention.q.weight, rows)


@pytest.mark.parametrize("layout", ["llama", "gpt2", "t5"])
def test_importance_is_the_energy_of_what_a_unit_adds(layout):
    done = work(layout)
    for units in (neurons_of(done.model), *([heads_of(done.model)] if layout != "gpt2" else [])):
        sites = reading(done.model, units)
        scores = importances(done, sites, {each.leave: each for each in units})
        for block in calibrated(done.model, done.batches, sites, gram=True):
            for path, inputs in block.items():
                each = next(each for each in units if each.leave == path)
                weight = affine_weight(done.model.get_submodule(path)).detach().double()
                for unit in range(each.count):
                    alone = torch.zeros_like(weight)
                    columns = each.columns(torch.tensor([unit]))
                    alone[:, columns] = weight[:, columns]
                    energy = float((alone @ inputs.product() @ alone.T).trace())
                    assert float(scores[path][unit]) == pytest.approx(energy, rel=1e-6, abs=1e-9)


def test_the_refit_is_least_squares_and_loses_less_than_leaving_out():
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(60, 9, generator=generator).double() @ torch.randn(9, 9, generator=generator).double()
    weight = torch.randn(5, 9, generator=generator).double()
    columns = torch.tensor([0, 2, 3, 7])
    best = torch.linalg.lstsq(inputs[:, columns], inputs @ weight.T).solution.T
    found = refitted(weight, inputs.T @ inputs, columns, 0.0)
    torch.testing.assert_close(found[:, columns], best)
    assert not found[:, [1, 4, 5, 6, 8]].any()
    heavy = refitted(weight, inputs.T @ inputs, columns, 1e9)
    torch.testing.assert_close(heavy[:, columns], weight[:, columns], rtol=1e-6, atol=1e-6)
    assert refitted(weight, torch.zeros(9, 9).double(), columns, 0.0)[:, columns].isfinite().all()


@pytest.mark.parametrize("cls", [PruneNeurons, PruneHeads])
def test_the_least_important_units_go_and_the_refit_helps(cls):
    done = work("llama")
    untouched = work("llama")
    pruner = cls(share=0.5, ridge=1e-4)
    units = {each.leave: each for each in pruner.units(untouched.model)}
    sites = reading(untouched.model, list(units.values()))
    scores = importances(untouched, sites, units)
    plain, first = work("llama"), {}
    for block in calibrated(plain.model, plain.batches, sites, gram=True):
        for path, inputs in block.items():
            each, weight = units[path], affine_weight(plain.model.get_submodule(path)).detach().double()
            kept = scores[path].argsort(descending=True)[:pruner.kept_count(each)].sort().values
            lost = weight.clone()
            lost[:, each.columns(kept)] = 0
            errors = [float((each @ inputs.product() @ each.T).trace()) for each in (lost, weight)]
            first[path] = (errors[0] / errors[1]) ** 0.5
        break
    facts = pruner.apply(done)
    records = {record["layer"]: record for record in facts.layers}
    assert all(records[path]["output_error"] < error for path, error in first.items())
    assert all(record["kept_importance"] > 0.5 for record in facts.layers)


@pytest.mark.parametrize("layout", WITHOUT)
def test_heads_as_wide_as_their_number_says_are_refused_by_name(layout):
    model = meta(layout)
    before = shapes(model)
    with pytest.raises(RefusedError, match=model.config.model_type):
        PruneHeads().sketch(model)
    assert shapes(model) == before


def test_what_a_configuration_cannot_describe_is_refused_before_anything_changes():
    model = meta("llama")
    before, config = shapes(model), model.config.to_dict()
    with pytest.raises(RefusedError, match="no head"):
        PruneHeads(share=0.1).sketch(model)
    with pytest.raises(RefusedError, match="no neuron"):
        PruneNeurons(share=0.1).sketch(model)  # 22 of 24 neurons are 24 in eights
    PruneNeurons(share=0.1, multiple=1).sketch(meta("llama"))
    with pytest.raises(RefusedError, match="leave blocks"):
        PruneHeads().within([1])
    layer = model.model.layers[1].mlp
    layer.up_proj = nn.Linear(16, 20, bias=False, device="meta")
    with pytest.raises(RefusedError, match="up, gate and down"):
        PruneNeurons().sketch(model)
    layer.up_proj = nn.Linear(16, 24, bias=False, device="meta")
    assert shapes(model) == before and model.config.to_dict() == config


def test_a_number_of_heads_that_transformers_does_not_accept_is_refused():
    import transformers as t

    with torch.device("meta"):
        model = t.LlamaForCausalLM(t.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                                 num_attention_heads=4, num_key_value_heads=4))
    before = shapes(model)
    with pytest.raises(RefusedError, match=r"does not accept.*num_attention_heads 3"):
        PruneHeads(share=0.25).sketch(model)
    assert shapes(model) == before and model.config.num_attention_heads == 4


def test_compressed_layers_have_no_units_to_remove():
    done = work("llama")
    Quantise(codec="int8", targets="up").apply(done)
    with pytest.raises(RefusedError):
        PruneNeurons().sketch(done.model)
    assert batches("llama")
