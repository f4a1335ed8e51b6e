"""Runs whose tensors change their sizes: resumed at every kind of moment, and taken back to a best step of other sizes."""

import pytest
import torch

from deltaloom.deltas.adalora import AdaLoRA
from deltaloom.deltas.lora import LoRA
from deltaloom.errors import CheckpointError
from deltaloom.events import RankChanged, Step, Warned
from deltaloom.train.checkpoints import read_checkpoint
from deltaloom.train.settings import TrainSettings
from deltaloom.tuned import attach
from tests.deltas.adaptive_pieces import kept, ranks
from tests.train.pieces import Log, assert_same, held_out_loss, run, small, state_of

SETTINGS = TrainSettings(max_steps=12, batch_size=6, learning_rate=1e-2, schedule="cosine", weight_decay=0.1, save_every=1,
                         keep_checkpoints=100)
METHODS = {"adalora": [AdaLoRA(rank=1, reserve=3, start=0.2, end=0.4, every=2, dropout=0.1), LoRA(rank=2, targets="q")],
           "few": [AdaLoRA(rank=0.3, reserve=7, start=0.2, end=0.4, every=2, importance="gradient")]}
# start 2: decisions after steps 4, 6 and, the last, 8


def fresh(name):
    return attach(small(), METHODS[name], seed=3)


@pytest.fixture(scope="module", params=METHODS)
def whole(request, tmp_path_factory):
    """An uninterrupted run: its name, its folder, its final tensors, its events."""
    folder, tuned, log = tmp_path_factory.mktemp("whole"), fresh(request.param), Log()
    run(tuned, SETTINGS, log, folder=folder)
    return request.param, folder, state_of(tuned), log


def told(log, after):
    return [(event.step, event.loss, event.penalty, event.gradient_norm) for event in log.of(Step) if event.step > after] + [
        (event.step, event.ranks, event.importance, event.parameters) for event in log.of(RankChanged) if event.step > after]


@pytest.mark.parametrize("step", [1, 4, 5, 7, 8, 9, 12])
def test_resumed_at_every_kind_of_moment_it_ends_bit_for_bit_the_same(whole, step):
    """Before the first decision, after it, between two, before the removal, right after it, in the last part, at the end."""
    name, folder, expected, events = whole
    tuned, log = fresh(name), Log()
    checkpoint = read_checkpoint(folder / f"step-{step}")
    assert len(expected) == len(checkpoint.parts["delta"])
    sizes = {tuple(tensor.shape) for key, tensor in checkpoint.parts["delta"].items() if key.endswith("core")}
    assert (len(sizes) > 1) == (step >= 8)
    run(tuned, SETTINGS, log, resume=checkpoint)
    assert_same(state_of(tuned), expected)
    assert told(log, 0) == told(events, step)
    assert not log.of(Warned)


def test_resumed_twice(whole, tmp_path):
    name, folder, expected, _ = whole
    tuned = fresh(name)
    run(tuned, SETTINGS, folder=tmp_path, resume=read_checkpoint(folder / "step-5"))
    again = fresh(name)
    run(again, SETTINGS, resume=read_checkpoint(tmp_path / "step-9"))
    assert_same(state_of(again), expected)


def test_a_rank_of_none_is_nothing_to_warn_of(whole):
    name, folder, _, _ = whole
    tuned = fresh(name)
    run(tuned, SETTINGS, resume=read_checkpoint(folder / "step-10"))
    assert 0 in ranks(tuned).values()


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("best", [2, 5, 7])
def test_the_best_step_may_lie_before_the_removal(in_folder, best, tmp_path):
    tuned, log, states = fresh("adalora"), Log(), {}
    count = iter(range(1, 13))
    settings = TrainSettings(max_steps=12, batch_size=6, learning_rate=1e-2, eval_every=1, restore_best=True)

    def evaluate(tuned):
        step = next(count)
        states[step] = held_out_loss(tuned)["loss"], kept(tuned)
        return {"loss": 0.0 if step == best else float(step)}

    result = run(tuned, settings, log, evaluate=evaluate, folder=tmp_path if in_folder else None)
    assert (result.step, result.best_step) == (12, best)
    assert ranks(tuned) == kept(tuned) == states[best][1]
    tuned.eval()
    assert held_out_loss(tuned)["loss"] == pytest.approx(states[best][0], rel=1e-6)
    total = sum(ranks(tuned).values())
    assert total == {2: 24, 5: 12, 7: 8}[best]  # at step 6 the curve has come down to 8.6
    warned = [event.message for event in log.of(Warned) if event.kind == "budget"]
    assert len(warned) == (total > 8)
    assert all("before the last decision" in message and f"{total} instead of 8" in message for message in warned)


def test_a_best_step_after_the_removal_needs_no_warning(tmp_path):
    tuned, log = fresh("adalora"), Log()
    values = iter([9.0] * 8 + [1.0, 2.0, 2.0, 2.0])
    settings = TrainSettings(max_steps=12, batch_size=6, learning_rate=1e-2, eval_every=1, restore_best=True)
    result = run(tuned, settings, log, evaluate=lambda tuned: {"loss": next(values)}, folder=tmp_path)
    assert result.best_step == 9 and sum(ranks(tuned).values()) == 8 and not log.of(Warned)
    assert_same(state_of(tuned), read_checkpoint(tmp_path / "step-9").parts["delta"])


def test_a_checkpoint_of_another_method_is_refused(whole):
    _, folder, _, _ = whole
    tuned = attach(small(), [AdaLoRA(rank=1, reserve=3, targets="o"), LoRA(rank=2, targets="q")], seed=3)
    before = state_of(tuned)
    with pytest.raises(CheckpointError, match="does not fit"):
        run(tuned, SETTINGS, resume=read_checkpoint(folder / "step-9"))
    assert_same(state_of(tuned), before)


def test_sgd_with_momentum_too(tmp_path):
    settings = TrainSettings(max_steps=12, batch_size=6, learning_rate=0.1, optimizer="sgd", save_every=1, keep_checkpoints=99)
    one, other = fresh("adalora"), fresh("adalora")
    run(one, settings, folder=tmp_path)
    run(other, settings, resume=read_checkpoint(tmp_path / "step-9"))
    assert_same(state_of(one), state_of(other))
    assert sum(ranks(one).values()) == 8


def test_averages_and_masks_in_a_checkpoint_are_those_of_the_run(whole):
    _, folder, _, _ = whole
    parts = read_checkpoint(folder / "step-5").parts
    (state,) = parts["controllers"]
    assert (state["step"], state["decisions"], state["compact"]) == (5, 1, False)
    numbers = sum(tensor.numel() for key, tensor in parts["delta"].items()
                  if "triplets" in key and tensor.is_floating_point())
    assert state["importance"]["smoothness"].shape == (numbers,) and state["previous"].sum() > 0
    assert any(not bool(tensor.all()) for key, tensor in parts["delta"].items() if key.endswith("mask"))
    (state,) = read_checkpoint(folder / "step-8").parts["controllers"]
    assert state["compact"] and state["importance"] is None
    assert all(bool(tensor.all()) for key, tensor in read_checkpoint(folder / "step-8").parts["delta"].items()
               if key.endswith("mask") and isinstance(tensor, torch.Tensor))
