"""Runs of the tensor methods with real checkpoints, resumed from before, at and after the removal of ranks bit for bit."""

import copy

import pytest
import torch
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from deltaloom.deltas.tsvd import TSVD
from deltaloom.deltas.tucker1 import Tucker1
from deltaloom.events import Acted, RankChanged, Step
from deltaloom.train.checkpoints import read_checkpoint
from deltaloom.train.settings import TrainSettings
from tests.train.pieces import Log, assert_same, held_out_loss, run, small, state_of, tuned_model

SETTINGS = TrainSettings(max_steps=10, batch_size=6, learning_rate=2e-2, schedule="cosine", weight_decay=0.01, save_every=1,
                         keep_checkpoints=100)
RANKS = {"rank": 1, "reserve": 2, "start": 0.1, "end": 0.4, "every": 2}  # decided after steps 2, 4 and, finally, 6
METHODS = {"haar": TSVD(**RANKS), "literal": TSVD(preset="literal", rule="budget", **RANKS),
           "data": TSVD(transform="data", **RANKS), "learned": TSVD(transform="learned", dropout=0.1, **RANKS),
           "fixed": TSVD(rule="fixed", **RANKS), "basis": Tucker1(basis="gradient", **RANKS),
           "random basis": Tucker1(basis="random", **RANKS)}
each_method = pytest.mark.parametrize("name", METHODS)


def new(name):
    """Three layers, so that the DFT has a pair of frequencies."""
    model = small()
    third = copy.deepcopy(model.transformer.h[1])
    for module in third.modules():
        if isinstance(module, GPT2Attention):
            module.layer_idx = 2
    model.transformer.h.append(third)
    model.config.n_layer = 3
    return tuned_model([METHODS[name]], model)


def decisions(log):
    return [(event.step, event.ranks, event.importance, event.parameters, event.residual) for event in log.of(RankChanged)]


@each_method
def test_resumed_from_any_step_it_is_the_uninterrupted_run(name, tmp_path):
    tuned, log = new(name), Log()
    born = state_of(tuned)
    run(tuned, SETTINGS, log, folder=tmp_path)
    expected = state_of(tuned)
    assert any(tensor.shape != born[key].shape for key, tensor in expected.items()) == (name != "fixed")
    assert [event.step for event in log.of(RankChanged)] == ([] if name == "fixed" else [2, 4, 6])
    warm = [event.action for event in log.of(Acted)].count("warm_up")
    assert warm == (name in ("data", "basis"))
    for step in (3, 6, 8):
        again, other = new(name), Log()
        torch.rand(step)
        run(again, SETTINGS, other, resume=read_checkpoint(tmp_path / f"step-{step}"))
        assert_same(state_of(again), expected)
        assert decisions(other) == [each for each in decisions(log) if each[0] > step]
        assert [(event.step, event.loss, event.gradient_norm) for event in other.of(Step)] \
            == [(event.step, event.loss, event.gradient_norm) for event in log.of(Step) if event.step > step]
        assert "warm_up" not in [event.action for event in other.of(Acted)]


@pytest.mark.parametrize("name", ["haar", "literal", "basis"])
def test_the_best_step_before_the_removal_comes_back_with_its_ranks_decided_so_far(name, tmp_path):
    settings = SETTINGS.model_copy(update={"eval_every": 1, "restore_best": True})
    scores = iter([5.0, 4.0, 3.0, 1.0] + [2.0] * 10)

    def evaluate(tuned):
        held_out_loss(tuned)
        return {"loss": next(scores)}
    tuned, log = new(name), Log()
    result = run(tuned, settings, log, folder=tmp_path, evaluate=evaluate)
    assert result.best_step == 4
    saved = read_checkpoint(tmp_path / "step-4").parts["delta"]
    other = new(name)
    other.load_delta_state(saved)
    ids = torch.randint(3, 20, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(tuned.eval()(input_ids=ids).logits, other.eval()(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert sum(t.numel() for t in tuned.delta_state().values()) <= sum(t.numel() for t in saved.values())
