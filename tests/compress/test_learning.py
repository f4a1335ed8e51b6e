"""Healing and distilling: each improves what it follows on held-out rows; the losses against the written-out formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from deltaloom.compress.distil import Distil, Hidden, Logits, Pupil, matched, scored
from deltaloom.compress.drop_layers import DropLayers
from deltaloom.compress.emulator import Emulator
from deltaloom.compress.heal import Heal
from deltaloom.errors import RefusedError, SettingsError, TargetError
from tests.compress.works import counting_work, deep_toy, held_out_loss, learned_toy, meta_of, work_on
from tests.toys import LAYOUTS

TRAIN = {"epochs": 2, "batch_size": 16, "learning_rate": 2e-3}


def dropped():
    work = counting_work(learned_toy())
    DropLayers(keep=2, choose="uniform").apply(work)
    return work


def test_the_toy_learned_and_dropping_hurts_it():
    assert held_out_loss(learned_toy()) < 0.6 < 1.0 < held_out_loss(dropped().model)


@pytest.mark.parametrize("step", [
    Heal(train=TRAIN), Heal(train=TRAIN, deltas=({"method": "full", "targets": "mlp"},)),
    Distil(train=TRAIN, task_weight=0), Distil(train=TRAIN, loss="hidden", weight=5),
    Distil(train=TRAIN, loss="offsite", weight=30),
    Distil(train=TRAIN, deltas=({"method": "lora", "rank": 8},)),
], ids=["heal", "heal-full", "logits", "hidden", "offsite", "distil-lora"])
def test_a_step_that_trains_improves_what_it_follows(step):
    work = dropped()
    before, names = held_out_loss(work.model), set(work.model.state_dict())
    facts = step.apply(work)
    after = held_out_loss(work.model)
    assert after < 0.9 * before
    assert set(work.model.state_dict()) == names and not work.model.training
    assert all(parameter.requires_grad for parameter in work.model.parameters())
    assert facts.figures["loss_at_the_end"] < facts.figures["loss_at_the_start"]


def test_distilling_is_repeatable():
    first, second = dropped(), dropped()
    for work in (first, second):
        Distil(train=TRAIN | {"epochs": 1}).apply(work)
    pairs = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_softened_divergence_is_the_written_out_one():
    own, theirs = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, q = (theirs / 3).softmax(-1), (own / 3).softmax(-1)
    expected = 9 * (p * (p.log() - q.log())).sum(-1).mean()
    assert float(Logits(3.0)(None, theirs, own)) == pytest.approx(float(expected))
    numbers = torch.tensor([[1.0], [2.0]])
    assert float(Logits(3.0)(None, numbers, numbers + 2)) == pytest.approx(4.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_pupils_loss_is_that_of_its_parts(layout):
    student, teacher = deep_toy(layout, 2), deep_toy(layout, 4, seed=1)
    work = work_on(student, layout)
    batch = work.batches[0]
    pupil = Pupil(teacher, Logits(2.0), Distil(weight=3.0, task_weight=0.5), work.task.generates)
    total, count = pupil.loss(student, batch)
    own, wanted = scored(student(**batch.inputs).logits, batch)
    theirs, _ = scored(teacher(**batch.inputs).logits, batch)
    expected = 3.0 * Logits(2.0)(batch, theirs, own) + 0.5 * F.cross_entropy(own, wanted)
    assert float(total) / count == pytest.approx(float(expected), rel=1e-5)
    task_total, task_count = work.task.loss(student, batch)
    assert float(F.cross_entropy(own, wanted)) == pytest.approx(float(task_total) / task_count, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_states_are_compared_block_by_block_without_padding(layout):
    from contextlib import ExitStack

    student, teacher = deep_toy(layout, 2), deep_toy(layout, 4, seed=1)
    work = work_on(student, layout)
    batch = work.batches[0]
    more = {"use_cache": False} if work.task.generates else {}
    with ExitStack() as hooks:
        compare = Hidden(work, teacher, None, hooks)
        mine, its = (model(**batch.inputs, **more, output_hidden_states=True) for model in (student, teacher))
        found = float(compare(batch, mine.logits, its.logits).detach())
    # the last entry of the library's hidden states has gone through the final norm, so only inner blocks are compared
    key = "encoder_hidden_states" if layout == "t5" else "hidden_states"
    mask = batch.inputs.get("attention_mask")
    if mask is None:
        mask = torch.arange(batch.inputs["input_ids"].shape[1])[None] < batch.lengths[:, None]
    s, t = mine[key][1][mask.bool()], its[key][2][mask.bool()]
    with ExitStack() as hooks:
        compare = Hidden(work, teacher, None, hooks)
        student(**batch.inputs, **more), teacher(**batch.inputs, **more)
        _, a, b = compare.pairs[0]
        assert torch.equal(a[-1][mask.bool()], s) and torch.equal(b[-1][mask.bool()], t)
    assert found > 0 and matched(2, 4, None) == [(0, 1), (1, 3)]
    same = copy.deepcopy(student)
    with ExitStack() as hooks:
        compare = Hidden(work, same, None, hooks)
        student(**batch.inputs, **more), same(**batch.inputs, **more)
        assert float(compare(batch, None, None).detach()) == 0.0


def test_which_blocks_are_compared():
    assert matched(3, 6, None) == [(0, 1), (1, 3), (2, 5)] and matched(2, 5, None) == [(0, 2), (1, 4)]
    assert matched(4, 10, 1) == [(2, 8)]


def test_what_cannot_be_done_is_said_before_training():
    with pytest.raises(SettingsError, match="unknown method"):
        Heal(deltas=({"method": "loraa"},))
    with pytest.raises(SettingsError, match="learning_rat"):
        Heal(train={"learning_rat": 1})
    with pytest.raises(TargetError):
        Heal(deltas=({"method": "lora", "targets": ["nowhere"]},)).sketch(meta_of(deep_toy("llama", 2)))
    work = dropped()
    with pytest.raises(RefusedError, match="cannot be merged"):
        Heal(deltas=({"method": "prefix", "length": 2},)).apply(work)
    assert held_out_loss(work.model) == held_out_loss(dropped().model)
    with pytest.raises(RefusedError, match="no rows"):
        Heal().apply(work_on(deep_toy("llama", 2), "llama", rows=0))
    with pytest.raises(RefusedError, match="original"):
        Distil().apply(work_on(deep_toy("llama", 2), "llama"))


def test_what_an_emulator_keeps_is_not_trained_later():
    work = counting_work(learned_toy())
    facts = Emulator(middle=1, keep_first=1, keep_last=1).apply(work)
    work.promised += facts.hashes
    before = {name: tensor.clone() for name, tensor in work.model.state_dict().items()}
    Distil(train=TRAIN | {"epochs": 1}, loss="offsite", keep_last=1).apply(work)
    changed = {name for name, tensor in work.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("model.layers.1.") for name in changed)
    with pytest.raises(RefusedError, match="no block left"):
        Heal(deltas=({"method": "lora", "rank": 2, "layers": [0]},)).apply(work)
    with pytest.raises(TargetError, match="no site is left"):
        Heal(deltas=({"method": "full", "targets": ["lm_head"]},)).apply(work)


@pytest.mark.parametrize("ratio", [0.5])
def test_factors_are_trained_as_factors(ratio):
    from deltaloom.compact.face import compact_layers
    from deltaloom.compress.svd import SVD

    work = counting_work(learned_toy())
    SVD(ratio=ratio).apply(work)
    before, names = held_out_loss(work.model), {name: t.shape for name, t in work.model.state_dict().items()}
    Heal(train=TRAIN).apply(work)
    assert held_out_loss(work.model) < 0.9 * before
    assert {name: t.shape for name, t in work.model.state_dict().items()} == names
    assert all(layer.form()["form"] == "factored" for layer in compact_layers(work.model).values())


def test_shared_factors_stay_shared_or_training_is_refused():
    from deltaloom.compress.base import weight_bytes
    from deltaloom.compress.shared_basis import SharedBasis

    work = counting_work(learned_toy())
    SharedBasis(ratio=0.6).apply(work)
    before, size = held_out_loss(work.model), weight_bytes(work.model)
    with pytest.raises(RefusedError, match="share a factor"):
        Heal(train=TRAIN).apply(work)
    assert held_out_loss(work.model) == before and weight_bytes(work.model) == size
    Distil(train=TRAIN).apply(work)
    assert held_out_loss(work.model) < 0.99 * before and weight_bytes(work.model) == size


def test_filled_zeros_are_told():
    from deltaloom.compress.magnitude import Magnitude

    work = counting_work(learned_toy())
    Magnitude().apply(work)
    assert any("zeros" in note for note in Heal(train=TRAIN).apply(work).notes)
