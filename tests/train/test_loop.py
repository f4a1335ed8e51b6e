from __future__ import annotations

import pytest
import torch
from torch import nn

from deltaloom.deltas.full import Full
from deltaloom.deltas.lora import LoRA
from deltaloom.errors import DataError, RefusedError, SettingsError
from deltaloom.events import Acted, Evaluated, Finished, Saved, Started, Step, Warned
from deltaloom.train.checkpoints import checkpoints
from deltaloom.train.loop import train
from deltaloom.train.progress import Goal
from deltaloom.train.settings import EarlyStop, TrainSettings
from deltaloom.tuned import attach
from tests.toys import toy
from tests.train.pieces import (
    LanguageTask,
    Log,
    ToyMethod,
    assert_all_differ,
    assert_same,
    feed,
    held_out_loss,
    rows,
    run,
    small,
    state_of,
    tuned_model,
)

PLAIN = [LoRA(rank=2)]  # no dropout


def test_loss_falls_and_the_base_stays():
    model = small(dropout=0.0)
    base = {name: p.clone() for name, p in model.named_parameters()}
    tuned, log = tuned_model(PLAIN, model), Log()
    result = run(tuned, TrainSettings(epochs=12, batch_size=8, learning_rate=3e-2), log)
    losses = [event.loss for event in log.of(Step)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert result.step == result.total_steps == len(losses) == 36
    tuned.detach()
    assert_same({name: p.detach() for name, p in model.named_parameters()}, base)


def test_step_events_tell_the_facts():
    log, settings = Log(), TrainSettings(epochs=1.5, batch_size=6, learning_rate=1e-2, warmup=0.0)
    result = run(tuned_model(), settings, log, floor_rate=1e6)
    steps = log.of(Step)
    assert [event.step for event in steps] == list(range(1, 7))
    assert [event.epoch for event in steps] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.25, 1.5])
    assert steps[0].learning_rate == 1e-2
    assert sum(event.tokens for event in steps[:4]) == sum(example.length for example in rows())
    assert result.tokens == sum(event.tokens for event in steps)
    assert all(0 <= event.padding < 1 and event.seconds > 0 and event.penalty > 0 and event.gradient_norm > 0 for event in steps)
    assert all(event.floor_share == pytest.approx(event.tokens / event.seconds / 1e6) for event in steps)
    assert result.seconds == pytest.approx(sum(event.seconds for event in steps))
    assert (log.of(Started)[0].total_steps, log.of(Finished)[0].reason) == (6, "completed")
    assert log.of(Finished)[0].tokens == result.tokens


def test_reading_less_often_changes_nothing_that_is_computed():
    states, losses = [], []
    for every in (1, 4):
        tuned, log = tuned_model(), Log()
        run(tuned, TrainSettings(max_steps=6, batch_size=4, log_every=every), log)
        states.append(state_of(tuned))
        losses.append([event.loss for event in log.of(Step)])
    assert_same(*states)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_two_runs_are_the_same_bit_for_bit(optimizer):
    states = []
    for _ in range(2):
        torch.rand(3)  # whatever happened before
        tuned = tuned_model()
        run(tuned, TrainSettings(max_steps=5, batch_size=4, optimizer=optimizer), seed=11)
        states.append(state_of(tuned))
    assert_same(*states)


def test_another_seed_is_another_run():
    states = []
    for seed in (1, 2):
        tuned = tuned_model([LoRA(rank=2, dropout=0.2)])
        run(tuned, TrainSettings(max_steps=4, batch_size=4), seed=seed)
        states.append(state_of(tuned))
    assert_all_differ(*states)


@pytest.mark.parametrize("micro_tokens", [1, 20, 40])
def test_accumulated_gradients_are_those_of_one_large_batch(micro_tokens):
    """Rows of unequal length, with unequal numbers of learned tokens, in micro-batches of unequal sizes."""
    settings = TrainSettings(max_steps=1, batch_size=12, learning_rate=0.1, optimizer="sgd", momentum=0.0, clip=None, warmup=0.0,
                             weight_decay=0.0, schedule="constant")
    states = []
    for limit in (micro_tokens, 10_000):
        tuned, log = tuned_model([LoRA(rank=2), ToyMethod(weight=0.01, controlled=False)], small(0.0).double()), Log()
        for parameter in tuned.delta_parameters().values():
            parameter.data = parameter.data.double()
        source = feed(settings, rows(12), micro_tokens=limit)
        assert (len(source.steps(0)[0]) > 1) == (limit < 10_000)
        run(tuned, settings, log, feed=source)
        states.append((state_of(tuned), log.of(Step)[0]))
    for name, tensor in states[0][0].items():
        torch.testing.assert_close(tensor, states[1][0][name], rtol=1e-6, atol=1e-9)
    assert states[0][1].loss == pytest.approx(states[1][1].loss, rel=1e-6)
    assert states[0][1].gradient_norm == pytest.approx(states[1][1].gradient_norm, rel=1e-6)


def test_one_step_is_loss_plus_penalty_by_the_book():
    settings = TrainSettings(max_steps=1, batch_size=6, learning_rate=0.1, optimizer="sgd", momentum=0.0, clip=0.5, warmup=0.0)
    methods = [LoRA(rank=2), ToyMethod(weight=0.3, controlled=False)]
    ours, book = tuned_model(methods, small(0.0)), tuned_model(methods, small(0.0))
    log = Log()
    source = feed(settings, rows(6))
    run(ours, settings, log, feed=source)
    sums, count = [], 0
    for micro in source.steps(0)[0]:
        loss, part = LanguageTask().loss(book, source.batch(micro, book.device))
        sums.append(loss)
        count += part
    penalty = book.penalty()
    (sum(sums) / count + penalty).backward()
    parameters = list(book.delta_parameters().values())
    norm = nn.utils.clip_grad_norm_(parameters, 0.5)
    torch.optim.SGD(parameters, lr=0.1).step()
    for name, tensor in book.delta_state().items():
        torch.testing.assert_close(ours.delta_state()[name], tensor, rtol=1e-5, atol=1e-7)
    step = log.of(Step)[0]
    assert step.loss == pytest.approx(float(sum(sums).detach() / count), rel=1e-5)
    assert step.penalty == pytest.approx(float(penalty.detach()), rel=1e-5)
    assert step.gradient_norm == pytest.approx(float(norm), rel=1e-5)


def test_controllers_are_called_once_a_step_and_finished():
    tuned = tuned_model([ToyMethod(targets="all-linear")])
    made = []
    controllers = tuned.controllers
    tuned.controllers = lambda plan: made.extend(controllers(plan)) or made
    run(tuned, TrainSettings(max_steps=3, batch_size=12))
    assert made[0].plan.total_steps == 3
    assert made[0].calls == [f"{what} {step}" for step in (1, 2, 3) for what in ("backward", "step")]
    assert made[0].finished


def test_evaluation_is_regular_in_evaluation_mode_and_leaves_no_trace():
    modes = []

    def evaluate(tuned):
        modes.append((tuned.training, torch.is_grad_enabled()))
        return held_out_loss(tuned)

    with_, without = tuned_model(), tuned_model()
    log = Log()
    result = run(with_, TrainSettings(epochs=2, batch_size=6, eval_every=3), log, evaluate=evaluate)
    run(without, TrainSettings(epochs=2, batch_size=6))
    assert_same(state_of(with_), state_of(without))
    assert [event.step for event in log.of(Evaluated)] == [3, 6, 8]
    assert modes == [(False, False)] * 3
    assert result.metrics == log.of(Evaluated)[-1].metrics
    assert not with_.training


@pytest.mark.parametrize(("every", "steps"), [(None, [4, 8]), (5, [5, 8]), (0.25, [2, 4, 6, 8]), (0.01, list(range(1, 9)))])
def test_when_evaluation_is_due(every, steps):
    log = Log()
    run(tuned_model(), TrainSettings(epochs=2, batch_size=6, eval_every=every), log, evaluate=held_out_loss)
    assert [event.step for event in log.of(Evaluated)] == steps


def scripted(values):
    """An evaluation that returns these numbers one after the other."""
    remaining = iter(values)
    return lambda tuned: {"score": next(remaining), "loss": 1.0}


def test_early_stop_counts_evaluations_without_progress_and_gives_the_reason():
    log = Log()
    settings = TrainSettings(max_steps=20, batch_size=6, eval_every=1, early_stop=EarlyStop(patience=2, min_delta=0.1))
    result = run(tuned_model(), settings, log, goal=Goal("score", True),
                 evaluate=scripted([0.1, 0.5, 0.55, 0.7, float("nan"), 0.75, 0.9]))
    assert (result.reason, result.step, result.best_step) == ("early_stop", 6, 6)
    assert [event.best for event in log.of(Evaluated)] == [True, True, True, True, False, True]
    acted = [event for event in log.of(Acted) if event.action == "early_stop"]
    assert "score" in acted[0].reason
    assert "0.75" in acted[0].reason


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_best_delta_can_be_restored(on_disk, tmp_path):
    settings = TrainSettings(max_steps=6, batch_size=6, eval_every=2, restore_best=True, keep_checkpoints=1)
    tuned, log, states = tuned_model(), Log(), []
    scores = scripted([3.0, 1.0, 2.0])

    def evaluate(tuned):
        states.append(state_of(tuned))
        return scores(tuned)

    result = run(tuned, settings, log, goal=Goal("score", False), evaluate=evaluate, folder=tmp_path / "c" if on_disk else None)
    assert (result.best_step, result.step, result.metrics["score"]) == (4, 6, 1.0)
    assert_same(state_of(tuned), states[1])
    assert [event.action for event in log.of(Acted)] == ["restore_best"]


def test_checkpoints_are_limited_to_the_newest_and_the_best(tmp_path):
    settings = TrainSettings(max_steps=8, batch_size=6, eval_every=2, save_every=1, keep_checkpoints=2)
    log = Log()
    run(tuned_model(), settings, log, goal=Goal("score", True), evaluate=scripted([0.1, 0.9, 0.3, 0.2]), folder=tmp_path)
    assert [step for step, _ in checkpoints(tmp_path)] == [4, 7, 8]
    assert [event.step for event in log.of(Saved)] == list(range(1, 9))
    assert log.of(Saved)[-1].bytes == sum(file.stat().st_size for file in (tmp_path / "step-8").iterdir())


def test_time_limits_a_run_and_decides_its_steps_when_alone():
    log = Log()
    result = run(tuned_model(), TrainSettings(max_time=0.5, batch_size=6, warmup=0.0), log)
    planned = [event for event in log.of(Acted) if event.action == "planned"]
    assert str(result.total_steps) in planned[0].reason
    assert result.reason in ("completed", "max_time")
    assert result.seconds < 3.0
    limited = run(tuned_model(), TrainSettings(epochs=100_000 / 4, max_time=0.2, batch_size=6))
    assert (limited.reason, limited.step < limited.total_steps) == ("max_time", True)


def test_trying_for_the_time_changes_nothing():
    timed, log = tuned_model(), Log()
    result = run(timed, TrainSettings(max_time=0.3, batch_size=6, schedule="constant", warmup=0.0), log)
    plain = tuned_model()
    run(plain, TrainSettings(max_steps=result.step, batch_size=6, schedule="constant", warmup=0.0))
    assert {n: v.shape for n, v in state_of(timed).items()} == {n: v.shape for n, v in state_of(plain).items()}
    losses = [event.loss for event in log.of(Step)]
    other = Log()
    run(tuned_model(), TrainSettings(max_steps=len(losses), batch_size=6, schedule="constant", warmup=0.0), other)
    assert losses[0] == other.of(Step)[0].loss


def test_gradient_checkpointing_is_the_same_training():
    states = []
    for on in (False, True):
        tuned = attach(toy("llama"), [LoRA(rank=2)], seed=1)
        run(tuned, TrainSettings(max_steps=3, batch_size=6, gradient_checkpointing=on))
        assert not any(getattr(module, "gradient_checkpointing", False) for module in tuned.modules())
        states.append(state_of(tuned))
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-4, atol=1e-5)


class Lonely(nn.Module):
    """Not a transformers model."""

    config = None

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])


def test_checkpointing_a_model_that_cannot_is_refused():
    tuned = attach(Lonely(), [LoRA(rank=1, targets="all")])
    with pytest.raises(RefusedError, match="gradient_checkpointing"):
        run(tuned, TrainSettings(gradient_checkpointing=True))
    assert not tuned.training or tuned.model.training  # the mode is put back


def test_a_base_in_fp16_has_float32_deltas_that_can_be_clipped():
    """peft#341: "Attempting to unscale FP16 gradients", because adapters and heads took the base's type."""
    tuned, log = tuned_model([LoRA(rank=2), Full(targets="ln_f")], small().half()), Log()
    before = state_of(tuned)
    run(tuned, TrainSettings(max_steps=3, batch_size=6, clip=0.01), log)
    assert {parameter.dtype for parameter in tuned.delta_parameters().values()} == {torch.float32}
    assert {parameter.dtype for parameter in tuned.model.transformer.wte.parameters()} == {torch.float16}
    assert all(event.gradient_norm > 0.01 for event in log.of(Step))
    assert_all_differ(state_of(tuned), before)


def test_batch_norms_stay_frozen():
    class Normed(LanguageTask):
        def loss(self, tuned, batch):
            assert tuned.training
            assert not extra.training
            return super().loss(tuned, batch)

    model = small()
    extra = model.transformer.extra = nn.BatchNorm1d(3)
    tuned = tuned_model(PLAIN, model)
    run(tuned, TrainSettings(max_steps=1), task=Normed())


@pytest.mark.parametrize("values", [{"early_stop": {"patience": 1}}, {"restore_best": True}, {"metric": "f1"}, {"eval_every": 3}])
def test_wishes_that_need_an_evaluation_are_refused_without_one(values):
    with pytest.raises(SettingsError, match=next(iter(values))):
        run(tuned_model(), TrainSettings(**values))


def test_an_unknown_metric_names_those_that_exist():
    with pytest.raises(SettingsError, match="accuracy") as error:
        run(tuned_model(), TrainSettings(max_steps=1), evaluate=held_out_loss, goal=Goal("accuracy", True))
    assert "loss" in str(error.value)


def test_no_rows_is_an_error():
    settings = TrainSettings()
    empty = feed(settings, rows(1))
    empty.examples, empty._lengths = [], []
    with pytest.raises(DataError, match="no training rows"):
        run(tuned_model(), settings, feed=empty)


def test_a_folder_of_another_run_is_not_written_into(tmp_path):
    settings = TrainSettings(max_steps=2, batch_size=6)
    run(tuned_model(), settings, folder=tmp_path)
    with pytest.raises(RefusedError, match="earlier run"):
        run(tuned_model(), settings, folder=tmp_path)


def test_no_warning_in_a_plain_run():
    log = Log()
    run(tuned_model(), TrainSettings(max_steps=2, batch_size=6), log)
    assert log.of(Warned) == []


@pytest.mark.parametrize("ahead", [2, 3, 50])
def test_forward_passes_that_run_ahead_change_nothing(ahead):
    settings = TrainSettings(batch_size=8, max_steps=3, learning_rate=0.01)
    states, steps = [], []
    for options in ({}, {"ahead": ahead, "before_step": steps.append}):
        tuned = tuned_model([LoRA(rank=2)], small(dropout=0.0))
        train(tuned, LanguageTask(), feed(settings, micro_tokens=24), settings=settings, **options)
        states.append(tuned.delta_state())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert steps == [1, 2, 3]
