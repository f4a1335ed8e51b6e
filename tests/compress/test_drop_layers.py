"""Dropping blocks: against the model whose dropped blocks pass their input on, a loop over hidden states, written-out CKA."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deltaloom.compress._blocks import stacks_of
from deltaloom.compress.base import weight_bytes
from deltaloom.compress.drop_layers import DropLayers, clusters, medoid, similarity
from deltaloom.errors import RefusedError, SettingsError, TargetError
from tests.compress.works import deep_toy, meta_of, work_on
from tests.toys import LAYOUTS, MORE_LAYOUTS, toy_batch

ALL = (*LAYOUTS, *MORE_LAYOUTS)


def passing(model: nn.Module, kept: dict[str, list[int]]) -> nn.Module:
    """The same model with every other block giving back its input."""
    model = copy.deepcopy(model)
    for path, layers in kept.items():
        for index, block in enumerate(model.get_submodule(path)):
            if index not in layers:
                block.register_forward_hook(_back, with_kwargs=True)
    return model


def _back(block, arguments, named, output):
    hidden = arguments[0] if arguments else named["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def logits(model, layout):
    inputs = toy_batch(layout)
    if layout in ("t5", "bart"):
        inputs["decoder_input_ids"] = inputs.pop("labels")
    with torch.no_grad():
        return model(**inputs).logits


def kept_by(facts) -> dict[str, list[int]]:
    kept: dict[str, list[int]] = {}
    for record in facts.layers:
        kept.setdefault(record["stack"], []).extend([record["layer"]] if record["kept"] else [])
    return kept


@pytest.mark.parametrize("layout", ALL)
def test_a_dropped_block_passes_its_input_on(layout):
    model = deep_toy(layout, 5)
    plain = copy.deepcopy(model)
    step = DropLayers(keep=3, choose="uniform")
    sketch = meta_of(model)
    step.sketch(sketch)
    facts = step.apply(work_on(model, layout))
    kept = kept_by(facts)
    assert all(len(layers) in (3, 4) for layers in kept.values())  # T5's first block stays besides
    assert torch.allclose(logits(model, layout), logits(passing(plain, kept), layout), atol=1e-6)
    assert weight_bytes(sketch) == weight_bytes(model)
    assert [stack.key for stack in stacks_of(model)] == [stack.key for stack in stacks_of(plain)]


@pytest.mark.parametrize("layout", ["llama", "gpt2", "t5", "qwen3"])
def test_generation_with_a_cache_equals_generation_without(layout):
    model = deep_toy(layout, 5)
    DropLayers(keep=2, choose="uniform").apply(work_on(model, layout))
    ids = toy_batch(layout, rows=2)["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids)
    with_cache = model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options))


def test_even_spacing_is_that_of_offsite_tuning():
    for count in range(2, 9):
        for total in range(count + 1, 12):
            model = deep_toy("llama", total)
            facts = DropLayers(keep=count, choose="uniform").apply(work_on(model, "llama"))
            got = kept_by(facts)["model.layers"]
            assert len(set(got)) == count
            # round(i * (total - 1) / (count - 1)) there; halves may go either way
            assert all(abs(layer - i * (total - 1) / (count - 1)) <= 0.5 for i, layer in enumerate(got))


@pytest.mark.parametrize("layout", ["llama", "bert"])
def test_influence_is_one_minus_the_mean_cosine_of_real_tokens(layout):
    model = deep_toy(layout, 4)
    work = work_on(model, layout)
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    taken: list[torch.Tensor] = []
    for batch in work.batches:
        taken.clear()
        inputs = {key: value for key, value in batch.inputs.items() if key == "input_ids"}
        mask = torch.arange(inputs["input_ids"].shape[1])[None] < batch.lengths[:, None]
        blocks = stacks_of(model)[0].blocks
        handles = [block.register_forward_hook(lambda m, a, o: taken.extend([a[0], o[0] if isinstance(o, tuple) else o]))
                   for block in blocks]
        with torch.no_grad():
            model(**inputs, attention_mask=mask.long())
        for handle in handles:
            handle.remove()
        for row in range(len(mask)):
            for place in range(int(mask[row].sum())):
                count += 1
                for layer in range(4):
                    a, b = taken[2 * layer][row, place].double(), taken[2 * layer + 1][row, place].double()
                    sums[layer] += float(a @ b / (a.norm() * b.norm()))
    expected = 1 - sums / count
    facts = DropLayers(keep=2, choose="block-influence").apply(work)
    assert [record["influence"] for record in facts.layers] == pytest.approx(expected.tolist(), abs=1e-6)
    assert kept_by(facts)[facts.layers[0]["stack"]] == sorted(expected.argsort(descending=True)[:2].tolist())


def test_similarity_is_linear_cka():
    a, b = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 7, dtype=torch.float64)
    a_c, b_c = a - a.mean(0), b - b.mean(0)
    expected = (b_c.T @ a_c).norm() ** 2 / ((a_c.T @ a_c).norm() * (b_c.T @ b_c).norm())
    found = similarity([a, b, 3 * a + 1])
    assert found[0, 1] == pytest.approx(float(expected)) and found[0, 2] == pytest.approx(1) and found[1, 1] == pytest.approx(1)


def test_clusters_are_neighbours_that_are_alike():
    alike = torch.tensor([[1, .9, .1, .1], [.9, 1, .2, .1], [.1, .2, 1, .8], [.1, .1, .8, 1]])
    assert clusters(alike, 2) == [[0, 1], [2, 3]]
    assert clusters(alike, 4) == [[0], [1], [2], [3]] and clusters(alike, 0) == []
    chain = torch.tensor([[1, .5, .1], [.5, 1, .6], [.1, .6, 1]])
    assert medoid(chain, [0, 1, 2]) == 1


@pytest.mark.parametrize("layout", ["llama", "t5"])
@pytest.mark.parametrize("choose", ["uniform", "block-influence", "cluster"])
def test_kept_ends_and_named_layers_are_respected(layout, choose):
    facts = DropLayers(keep=1, choose=choose, keep_first=2, keep_last=1).apply(work_on(deep_toy(layout, 6), layout))
    for layers in kept_by(facts).values():
        assert {0, 1, 5} < set(layers) and len(layers) == 4
    facts = DropLayers(ratio=0.5, choose=choose, layers=(2, 3)).apply(work_on(deep_toy(layout, 6), layout))
    for layers in kept_by(facts).values():
        assert {0, 1, 4, 5} < set(layers) and len(layers) == 5


def test_impossible_amounts_are_refused_on_the_sketch():
    for step, kind in [(DropLayers(keep=4), RefusedError), (DropLayers(keep=9), RefusedError),
                       (DropLayers(ratio=0.9), RefusedError), (DropLayers(keep=0), RefusedError),
                       (DropLayers(keep=1, keep_first=3, keep_last=2), TargetError),
                       (DropLayers(keep=1, layers=(7,)), TargetError)]:
        with pytest.raises(kind):
            step.sketch(meta_of(deep_toy("llama", 4)))
    with pytest.raises(SettingsError, match="give one of"):
        DropLayers()
    with pytest.raises(SettingsError, match="give one of"):
        DropLayers(keep=1, ratio=0.5)


def test_a_block_whose_number_matters_is_not_renumbered():
    model = deep_toy("gpt2", 4)
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(TargetError, match="under another number"):
        DropLayers(keep=2).sketch(meta_of(model))
