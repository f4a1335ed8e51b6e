"""Ranks of the t-SVD delta while training: budgets, tubes, presets, what is recovered, and what goes wrong loudly."""

import math

import pytest
import torch
from torch import nn

from deltaloom.checkpoint import native
from deltaloom.deltas.base import StepPlan, method_from, method_record
from deltaloom.deltas.lora import LoRA
from deltaloom.deltas.tsvd import LITERAL, TSVD
from deltaloom.errors import NonFiniteError, SettingsError, TargetError
from deltaloom.events import Emitter, RankChanged
from deltaloom.linalg import transforms
from deltaloom.train.warmup import warm_up
from deltaloom.tuned import attach
from tests.contract.cases import assert_same_tensors, gradients, logits, perturb, state
from tests.deltas.tensor_oracles import (
    TRANSFORMS,
    deep_bert,
    dense_of_saved,
    groups_of,
    loss_of,
    members,
    numbers,
    train,
    tuned_of,
)
from tests.toys import toy, toy_batch

each_transform = pytest.mark.parametrize("name", TRANSFORMS)
SCHEDULE = {"start": 0.2, "end": 0.3, "every": 2}


def cost(tuned, rank):
    return sum(rank * group.layers * group.cost for group in groups_of(tuned).values())


# ---- budgets -----------------------------------------------------------------------------------------------------------


@each_transform
@pytest.mark.parametrize("rule", ["budget", "capped"])
def test_the_budget_in_parameters_is_kept_over_groups_of_different_shapes(name, rule):
    tuned = tuned_of(name, dtype=torch.float32, shaken=False, rank=1.5, reserve=2, rule=rule, **SCHEDULE)
    allowed, start, log, seen = cost(tuned, 1.5), numbers(tuned), [], []
    losses = train(tuned, lambda: loss_of(tuned), 20, log=log, each=lambda step: seen.append(numbers(tuned)))
    assert losses[-1] < losses[0]
    events = [event for event in log if isinstance(event, RankChanged)]
    assert [event.step for event in events] == [6, 8, 10, 12, 14]
    assert seen[:13] == [start] * 13 and set(seen[13:]) == {numbers(tuned)}
    assert all(event.parameters <= event.budget + 1 for event in events)
    largest = max(float(group.triplets.numbers().max()) for group in groups_of(tuned).values())
    assert allowed - largest < numbers(tuned) <= allowed
    assert events[-1].parameters == numbers(tuned) and events[-1].rows == "frequency"
    for key, group in groups_of(tuned).items():
        kept = torch.bincount(group.triplets.block, minlength=len(group.weights)).tolist()
        assert events[-1].ranks[key] == kept


@pytest.mark.parametrize("name", ["haar", "dft", "frame"])
def test_a_tube_is_kept_at_all_frequencies_or_at_none(name):
    tuned = tuned_of(name, dtype=torch.float32, shaken=False, granularity="tube", reserve=2, rule="budget", **SCHEDULE)
    masks = []

    def look(step):
        for group in groups_of(tuned).values():
            index, mask = group.index(), group.triplets.mask
            masks.append(mask.clone())
            for tube in index.unique():
                assert len(set(mask[index == tube].tolist())) == 1
    train(tuned, lambda: loss_of(tuned), 20, each=look)
    assert any(not mask.all() for mask in masks)
    for group in groups_of(tuned).values():
        counts = torch.bincount(group.triplets.block)
        assert counts.tolist() == [len(counts) and counts[0]] * len(counts) and len(counts) in (0, len(group.weights))
    assert numbers(tuned) <= cost(tuned, 2)


@each_transform
def test_fixed_ranks_stay_and_vectors_become_orthonormal(name):
    tuned = tuned_of(name, dtype=torch.float32, rule="fixed", orthogonality=0.4)
    before = numbers(tuned)
    train(tuned, lambda: loss_of(tuned), 20, lr=1e-4)
    assert numbers(tuned) == before
    assert all(group.triplets.residual() < 0.02 for group in groups_of(tuned).values())
    assert attach(deep_bert(), [TSVD(rule="fixed", orthogonality=0.0)]).controllers(StepPlan(8)) == []


def test_a_trained_delta_can_be_trained_again():
    tuned = tuned_of("haar", dtype=torch.float32, shaken=False, **SCHEDULE)
    train(tuned, lambda: loss_of(tuned), 20)
    before = numbers(tuned)
    train(tuned, lambda: loss_of(tuned), 20)
    assert 0 < numbers(tuned) <= before


def test_nothing_is_kept_beyond_the_reserve_where_there_is_none():
    tuned = tuned_of("dft", dtype=torch.float32, shaken=False, reserve=1, **SCHEDULE)
    before = numbers(tuned)
    train(tuned, lambda: loss_of(tuned), 20)
    assert 0.9 * before < numbers(tuned) <= before


# ---- settings ----------------------------------------------------------------------------------------------------------


def test_the_literal_preset_is_its_parts_and_explicit_settings_win():
    method = TSVD(preset="literal", rank=3)
    assert method_record(method) == method_record(TSVD(rank=3, **LITERAL))
    assert LITERAL == {"transform": "dft", "granularity": "tube", "rule": "share", "importance": "gradient", "penalty": "loss"}
    mixed = TSVD(preset="literal", transform="dct", rule="capped")
    assert (mixed.transform, mixed.rule, mixed.granularity, mixed.penalty) == ("dct", "capped", "tube", "loss")
    for one in (method, mixed):
        record = method_record(one)
        assert "preset" not in record and method_from(record) == one
    assert method_from({"method": "tsvd", "preset": "literal"}) == TSVD(preset="literal")


@pytest.mark.parametrize(("settings", "says"), [
    ({"preset": "litteral"}, "must be 'literal', got 'litteral'"),
    ({"rule": "fixed", "rank": 0.5}, "whole number, got 0.5"),
    ({"rule": "fixed", "rank": 2.5}, "whole number, got 2.5"),
    ({"start": 0.6, "end": 0.4}, "below 1"),
    ({"transform": "fft"}, "identity"),
    ({"rank": 0}, "greater than 0"),
    ({"orthogonality": 1.0}, "a step of 1 or more leads away from orthonormal ones, got 1")])
def test_settings_that_are_refused(settings, says):
    with pytest.raises(SettingsError, match=says):
        TSVD(**settings)


def test_ranks_and_budgets_that_cannot_be_are_refused():
    with pytest.raises(SettingsError, match=r"rank 9 x reserve 1.5 = 14[\s\S]*8 x 16"):
        attach(toy("llama"), [TSVD(rank=9)])
    tuned = attach(deep_bert(), [TSVD(rank=0.02, targets="q")])
    with pytest.raises(SettingsError, match=r"too small.*got '2 parameters'.*at least 33, which is one entry"):
        tuned.controllers(StepPlan(20))
    tuned = attach(deep_bert(), [TSVD(rank=0.5, targets="q", granularity="tube")])
    with pytest.raises(SettingsError, match=r"at least 99, which is one tube"):
        tuned.controllers(StepPlan(20))
    tuned = attach(deep_bert(), [TSVD(rank=0.5, targets="q", granularity="tube", rule="share")])
    assert len(tuned.controllers(StepPlan(20))) == 1
    with pytest.raises(SettingsError, match="longer than the run"):
        attach(deep_bert(), [TSVD(every=30)]).controllers(StepPlan(20))
    with pytest.raises(TargetError):
        attach(deep_bert(), [TSVD(targets=("no_such",))])
    with pytest.raises(TargetError):
        attach(nn.Sequential(nn.ReLU()), [TSVD(targets="all")])


def test_groups_of_one_layer_work_and_every_layer_is_in_one_group_only():
    tuned = attach(toy("bert"), [TSVD(rank=1, targets=("query", "q", "re:.*query", "classifier"), layers=None)])
    assert {key: len(each) for key, each in members(tuned).items()} == {"q-16x16": 2, "head-3x16": 1}
    train(tuned, lambda: tuned(**toy_batch("bert")).loss, 12)
    names = [site.name for each in members(tuned).values() for site, _ in each]
    assert sorted(names) == sorted(set(names))


def test_tied_layers_have_slices_of_their_own_and_untie_where_they_merge():
    """Two layers that share one weight are two sites: each gets its own change, and merging gives each its own weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    x = torch.randn(4, 6)
    tuned = attach(model, [TSVD(rank=2, transform="haar", targets="all")])
    perturb(tuned)
    (_, one), (_, other) = tuned.pairs()
    assert (one.layer, other.layer) == (0, 1) and not torch.allclose(one.matrix(), other.matrix())
    with torch.no_grad():
        apart = tuned(x)
        tuned.merge()
        torch.testing.assert_close(tuned(x), apart, rtol=1e-5, atol=1e-5)
    tuned.unmerge()
    assert tuned.detach()[0].weight is model[1].weight


# ---- removal, saving ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "granularity"), [*((name, "entry") for name in TRANSFORMS), ("dft", "tube"), ("haar", "tube")])
def test_rounds_of_training_removing_saving_and_loading_change_no_output(name, granularity, tmp_path):
    tuned = tuned_of(name, dtype=torch.float32, shaken=False, granularity=granularity, rule="effective", **SCHEDULE)
    sizes = []
    for number in range(3):
        train(tuned, lambda tuned=tuned: loss_of(tuned), 12)
        slices = {key: dense_of_saved(group) for key, group in groups_of(tuned).items()}
        native.save(tuned, tmp_path / f"{number}")
        loaded = native.load(deep_bert(), tmp_path / f"{number}")
        assert_same_tensors(state(loaded), state(tuned))
        assert torch.equal(logits(loaded, "bert"), logits(tuned, "bert"))
        for key, group in groups_of(loaded).items():
            torch.testing.assert_close(dense_of_saved(group), slices[key], rtol=0, atol=1e-12)
        sizes.append(numbers(tuned))
        tuned = loaded
    assert sizes[0] > sizes[-1] or granularity == "tube"


@each_transform
def test_a_state_of_other_ranks_is_taken_back(name):
    """As restoring the best step does: entries that were removed since come back."""
    tuned = tuned_of(name, dtype=torch.float32, **SCHEDULE)
    before, answers = state(tuned), logits(tuned, "bert")
    train(tuned, lambda: loss_of(tuned), 20)
    assert numbers(tuned) < sum(tensor.numel() for key, tensor in before.items() if ":triplets.up" in key or "down" in key)
    tuned.load_delta_state(before)
    assert_same_tensors(state(tuned), before)
    assert torch.equal(logits(tuned, "bert"), answers)


# ---- the transform that is found from gradients ------------------------------------------------------------------------


def weight_gradients(model, loss, batches):
    """The gradients of an untouched model's own parameters, summed over batches, in float64."""
    for batch in batches:
        loss(model, batch).backward()
    found = {name: parameter.grad.double() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def model_loss(model, batch):
    return model(**batch).loss


@pytest.mark.parametrize("layout", ["bert", "llama", "t5"])
def test_data_is_the_eigenvectors_of_the_gradients_gram_matrix(layout):
    """Exactly where a layer has at most 64 inputs, whose gradients are not sketched."""
    tuned = attach(toy(layout), [TSVD(rank=1, transform="data", warm_up_batches=2)])
    batches = [toy_batch(layout, seed=seed) for seed in (1, 2, 3)]
    gradient = weight_gradients(toy(layout), model_loss, batches[:2])
    before = state(tuned)
    assert warm_up(tuned, batches, lambda batch: tuned(**batch).loss, Emitter()) == 2
    for key, each in members(tuned).items():
        stack = torch.stack([gradient[f"{site.path}.weight"].flatten() for site, _ in each])
        expected = transforms.data(stack @ stack.T).weights
        torch.testing.assert_close(groups_of(tuned)[key].weights.double().abs(), expected.abs(), rtol=0, atol=1e-3)
    assert all(torch.equal(before[key], tensor) for key, tensor in state(tuned).items() if not key.endswith("weights"))
    assert any(not torch.equal(before[key], tensor) for key, tensor in state(tuned).items())


def test_sketches_of_wide_layers_tell_independent_gradients_apart():
    """Of 96 inputs 64 random directions are looked at: gradients that are nearly orthogonal stay so, in order of size."""
    torch.manual_seed(0)
    tuned = attach(nn.Sequential(*(nn.Linear(96, 20) for _ in range(4))), [TSVD(rank=1, transform="data", targets="all")])
    watch, = tuned.warm_ups()
    for size, (site, _) in zip((1, 4, 0.25, 16), tuned.pairs(), strict=True):
        watch.observe(site, torch.randn(30, 96), size * torch.randn(30, 20))
    watch.finish()
    group, = groups_of(tuned).values()
    expected = torch.eye(4)[[3, 1, 0, 2]]
    torch.testing.assert_close(group.weights.abs(), expected, rtol=0, atol=0.1)


def test_a_layer_without_gradients_counts_as_having_zeros_and_infinite_ones_are_refused():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
    tuned = attach(model, [TSVD(rank=1, transform="data", targets="all", warm_up_batches=1)])
    warm_up(tuned, [torch.randn(4, 5)], lambda x: tuned.model[1](tuned.model[0](x)).square().sum(), Emitter())
    group, = groups_of(tuned).values()
    assert group.weights[2].abs().tolist() == pytest.approx([0, 0, 1], abs=1e-6)
    assert float(group.weights[:2, 2].abs().max()) < 1e-6 and float(group.weights[0].abs().min()) < 1
    with pytest.raises(NonFiniteError):
        warm_up(tuned, [torch.full((1, 5), math.inf)], lambda x: tuned(x).sum(), Emitter())


def test_a_saved_delta_carries_its_transform(tmp_path):
    tuned = attach(toy("bert"), [TSVD(rank=1, transform="data"), LoRA(rank=1)])
    warm_up(tuned, [toy_batch("bert")], lambda batch: tuned(**batch).loss, Emitter())
    perturb(tuned)
    native.save(tuned, tmp_path / "d")
    loaded = native.load(toy("bert"), tmp_path / "d")
    assert torch.equal(logits(loaded, "bert"), logits(tuned, "bert"))
    one, other = (next(iter(groups_of(each).values())).weights for each in (tuned, loaded))
    assert torch.equal(one, other) and not torch.equal(one, torch.eye(2))


@pytest.mark.parametrize("name", ["learned"])
def test_the_learned_transform_trains_and_stays_orthonormal(name):
    tuned = tuned_of(name, dtype=torch.float64)
    loss_of(tuned).backward()
    assert all(gradient.any() for key, gradient in gradients(tuned).items() if key.endswith("skew"))
    train(tuned, lambda: loss_of(tuned), 12)
    for group in groups_of(tuned).values():
        rows = transforms.rotation(group.skew, group.weights).detach()
        assert group.skew.any()
        torch.testing.assert_close(rows @ rows.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
