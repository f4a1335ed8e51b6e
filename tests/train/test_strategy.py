"""Strategies in the one loop: what they do is done, told, kept by checkpoints and repeated bit for bit."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from deltaloom.deltas.adalora import AdaLoRA
from deltaloom.deltas.lora import LoRA
from deltaloom.errors import NonFiniteError, SettingsError
from deltaloom.events import Acted, RankChanged, Step
from deltaloom.train.checkpoints import read_checkpoint
from deltaloom.train.noise import NoiseMeter
from deltaloom.train.progress import Goal
from deltaloom.train.settings import TrainSettings
from deltaloom.train.strategy import Strategy, strategy_from
from deltaloom.tuned import Tuned, attach
from tests.toys import toy
from tests.train.pieces import LanguageTask, Log, assert_same, feed, held_out_loss, run, small, state_of, tuned_model

FIT, LOSS = Goal("fit", True), Goal("loss", False)
SETTINGS = TrainSettings(max_steps=24, batch_size=6, learning_rate=1e-2, schedule="constant", warmup=0, eval_every=2,
                         save_every=1, keep_checkpoints=99)


def strategy(section, goal=LOSS, methods=(), settings=SETTINGS):
    plan = strategy_from({"noise": False} | section, settings)
    return Strategy(plan, goal, plan.waiting(methods))


def scripted(values):
    """Evaluations that were written down; a run that is resumed goes on after `begin` of them."""
    def evaluate(begin=0):
        count = iter(values[begin:])
        return lambda tuned: {"loss": next(count)}
    return evaluate


def acted(log):
    return [(event.step, event.action) for event in log.of(Acted) if event.action not in ("resumed", "warm_up")]


def test_a_plateau_lowers_the_rate_from_the_next_step_on():
    log = Log()
    plan = {"plateau": {"patience": 2, "times": 2, "factor": 0.1}, "overfitting": False, "divergence": False}
    run(tuned_model(), SETTINGS, log, evaluate=scripted([1.0] * 12)(), strategy=strategy(plan))
    assert acted(log) == [(4, "lower_rate"), (8, "lower_rate")] or acted(log) == [(6, "lower_rate"), (10, "lower_rate")]
    first = acted(log)[0][0]
    rates = {event.step: event.learning_rate for event in log.of(Step)}
    assert rates[first] == pytest.approx(1e-2) and rates[first + 1] == pytest.approx(1e-3)
    assert rates[24] == pytest.approx(1e-4)
    assert "has not become better in 2 evaluations" in log.of(Acted)[0].reason


def test_overfitting_stops_with_the_best_delta():
    log, kept = Log(), {}
    values = iter([3.0, 1.0, 2.0, 2.1, 2.2, 2.3])

    def evaluate(tuned):
        value = next(values)
        kept[value] = state_of(tuned)
        return {"loss": value}

    tuned = tuned_model([LoRA(rank=2)])
    found = run(tuned, SETTINGS, log, evaluate=evaluate, strategy=strategy({"plateau": False, "divergence": False}))
    assert (found.reason, found.step, found.best_step) == ("overfitting", 10, 4)
    assert_same(state_of(tuned), kept[1.0])
    assert [action for _, action in acted(log)] == ["stop", "restore_best"]


class Exploding(LanguageTask):
    """A task whose loss is not finite at some calls, and counts them."""

    def __init__(self, bad):
        self.bad, self.calls = bad, 0

    def loss(self, tuned, batch):
        self.calls += 1
        loss, count = super().loss(tuned, batch)
        return loss * (math.nan if self.calls in self.bad else 1.0), count


@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "memory"])
def test_a_step_that_is_not_finite_goes_back_to_the_best_and_on(on_disk, tmp_path):
    log, settings = Log(), SETTINGS.model_copy(update={"max_steps": 8})
    rows = feed(settings, micro_tokens=10 ** 6)
    tuned = tuned_model([LoRA(rank=2)])
    values = scripted([2.0, 1.0, 3.0, 3.0])
    found = run(tuned, settings, log, task=Exploding({6}), feed=rows, evaluate=values(), folder=tmp_path if on_disk else None,
                strategy=strategy({"plateau": False, "overfitting": False}))
    assert found.step == 8 and acted(log) == [(5, "restore_best"), (5, "lower_rate")]
    assert [event.step for event in log.of(Step)] == list(range(1, 9))
    assert log.of(Step)[5].learning_rate == pytest.approx(0.3e-2)
    with pytest.raises(NonFiniteError):
        run(tuned_model([LoRA(rank=2)]), settings, task=Exploding({1}), feed=rows, evaluate=values(), strategy=strategy({}))
    with pytest.raises(NonFiniteError):
        run(tuned_model([LoRA(rank=2)]), settings, task=Exploding({6}), feed=rows, evaluate=values())


class MatrixTask:
    """The change at every site is to be a given matrix of a given rank with equal singular values: rank r fits r of them."""

    def __init__(self, rank: int) -> None:
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.linalg.qr(torch.randn(16, rank, generator=generator)).Q for _ in range(2))
        self.wanted = left @ right.T

    def error(self, tuned: Tuned) -> torch.Tensor:
        deltas = [delta for _, delta in tuned.attached()[0].attachment.deltas.items()]
        return sum(((delta.matrix() - self.wanted) ** 2).sum() for delta in deltas) / len(deltas) / (self.wanted ** 2).sum()

    def loss(self, tuned, batch):
        return self.error(tuned), 1.0

    def fit(self, tuned):
        return {"fit": 1.0 - float(self.error(tuned))}


GROWING = AdaLoRA(rank=1, reserve=4, targets=("q",), start=0.0, end=0.1)
LONG = TrainSettings(max_steps=900, batch_size=24, learning_rate=2e-2, schedule="constant", warmup=0, eval_every=15,
                     save_every=None, keep_checkpoints=2, log_every=15)
TARGET = {"target_metric": {"fit": 0.95}, "plateau": False, "overfitting": False, "divergence": False,
          **{rule: {"min_delta": 0.01} for rule in ("grow", "biases", "give-up")}}


def grown(rank, section=TARGET, settings=LONG, **options):
    task, log = MatrixTask(rank), Log()
    plan = strategy_from(section, settings)
    waiting = plan.waiting([GROWING])
    tuned = attach(toy("bert"), [GROWING, *waiting], seed=3)
    options.setdefault("evaluate", task.fit)
    result = run(tuned, settings, log, task=task, strategy=Strategy(plan, FIT, waiting), **options)
    return result, tuned, log


@pytest.fixture(scope="module")
def reached():
    return grown(3)


def test_started_at_rank_one_it_grows_until_the_target_is_met(reached):
    result, tuned, log = reached
    assert result.reason == "target_met" and result.metrics["fit"] >= 0.95 and result.step < 900
    actions = [action for _, action in acted(log)]
    assert actions == ["grow"] * (len(actions) - 1) + ["stop"] and len(actions) >= 2
    changes = log.of(RankChanged)
    assert sum(map(sum, (ranks for ranks in changes[0].ranks.values()))) == 4  # twice as many
    ranks = [delta.factors()[0].shape[0] for _, delta in tuned.pairs()]
    assert all(3 <= rank <= 4 for rank in ranks)  # what waited is gone from memory
    assert [part.method.name for part in tuned.attached()] == ["adalora"]  # and biases that nobody needed
    early = next(event for event in log.of(Acted) if event.action == "grow")
    assert "the target is 0.95" in early.reason and "numbers act instead of" in early.reason


def test_an_unreachable_target_is_given_up_with_the_reason_after_everything_was_tried_within_the_budget():
    one = 16 + 16 + 1  # numbers of a component; three at each of two sites fit
    result, tuned, log = grown(8, {**TARGET, "grow": {"budget": 6 * one + 5, "min_delta": 0.01}})
    assert result.reason == "target_missed"
    assert [action for _, action in acted(log)][:4] == ["grow", "grow", "unfreeze", "stop"]
    assert "nothing is left to try" in next(event.reason for event in log.of(Acted) if event.action == "stop")
    adaptive, biases = tuned.attached()
    assert biases.method.name == "bitfit"
    assert sum(delta.factors()[0].shape[0] for delta in adaptive.attachment.deltas.values()) == 6


def test_what_cannot_grow_is_refused_before_the_first_step():
    for budget, text in ((1, "spent before the first step"), (66, "spent before the first step")):
        with pytest.raises(SettingsError, match=text):
            grown(3, {**TARGET, "grow": {"budget": budget}})
    plan = strategy({"target_metric": {"loss": 1.0}, "grow": {}, "biases": False})
    with pytest.raises(SettingsError, match="needs a method that can grow"):
        run(tuned_model([LoRA(rank=2)]), SETTINGS, evaluate=held_out_loss, strategy=plan)
    with pytest.raises(SettingsError, match="nothing to evaluate on"):
        run(tuned_model(), SETTINGS, strategy=strategy({}))


def test_resumed_in_the_middle_of_a_strategy_it_ends_the_same(tmp_path: Path):
    """Everything at once: growth, biases, lower rates; from before, between and after the actions."""
    section = {"target_metric": {"loss": 0.0}, "noise": False, "plateau": {"patience": 1, "times": 1}, "grow": {"patience": 1},
               "biases": {"patience": 1}, "give-up": {"patience": 4}, "overfitting": False}
    settings = TrainSettings(max_steps=16, batch_size=6, learning_rate=1e-2, eval_every=2, save_every=1, keep_checkpoints=99)
    values = scripted([2.0, 3.0, 3.0, 3.0, 3.0, 1.0, 3.0, 3.0])
    method = AdaLoRA(rank=1, reserve=4, targets=("q", "k"), start=0.0, end=0.1)

    def attempt(begin, **options):
        plan = strategy_from(section, settings)
        waiting = plan.waiting([method])
        tuned, log = attach(small(), [method, *waiting], seed=3), Log()
        result = run(tuned, settings, log, evaluate=values(begin), strategy=Strategy(plan, LOSS, waiting), **options)
        return tuned, log, result

    tuned, log, result = attempt(0, folder=tmp_path)
    actions = acted(log)
    assert [action for _, action in actions][:5] == ["lower_rate", "grow", "grow", "unfreeze", "stop"][:len(actions)]
    assert {"lower_rate", "grow", "unfreeze"} <= {action for _, action in actions}
    for step in (3, 5, 6, 9, 13):
        other, events, again = attempt(step // 2, resume=read_checkpoint(tmp_path / f"step-{step}"))
        assert_same(state_of(other), state_of(tuned))
        assert acted(events) == [each for each in actions if each[0] > step]
        assert (again.step, again.reason) == (result.step, result.reason)


def test_the_noise_scale_is_that_of_known_gradients():
    generator = torch.Generator().manual_seed(0)
    parameter, mean = torch.nn.Parameter(torch.zeros(50)), torch.full((50,), 0.3)
    meter, tokens = NoiseMeter(), 8
    for _ in range(300):
        parameter.grad = torch.zeros(50)
        for _ in range(4):
            parameter.grad += (mean + torch.randn(tokens, 50, generator=generator)).sum(0)  # tr(S) = 50, |G|^2 = 4.5
            meter.after_micro_batch([parameter], float(tokens))
        meter.after_step(meter.parts(), [parameter.grad], 4.0 * tokens)
    noise, batch = meter.read()
    assert noise == pytest.approx(50 / 4.5, rel=0.05) and batch == 32
    other = NoiseMeter()
    other.load(meter.state())
    assert other.read() == (noise, batch)
    meter.forget()
    assert meter.read() == (None, None)


def test_measuring_noise_changes_nothing():
    settings = SETTINGS.model_copy(update={"max_steps": 4})
    one, other = tuned_model(), tuned_model()
    run(one, settings, evaluate=held_out_loss)
    run(other, settings, evaluate=held_out_loss, strategy=strategy({"plateau": {"patience": 50}}))
    assert_same(state_of(one), state_of(other))
