"""Every rule of a strategy on made-up evaluations: when it acts, what it wants, and when it keeps quiet."""

from __future__ import annotations

import pytest

from deltaloom.errors import SettingsError
from deltaloom.registry import names_in
from deltaloom.train.progress import Goal
from deltaloom.train.rules.base import Grow, Lower, Recommend, Release, Restore, Seen, Stop
from deltaloom.train.rules.biases import Biases
from deltaloom.train.rules.divergence import Divergence
from deltaloom.train.rules.give_up import GiveUp
from deltaloom.train.rules.grow import Growth
from deltaloom.train.rules.noise import Noise
from deltaloom.train.rules.overfitting import Overfitting
from deltaloom.train.rules.plateau import Plateau
from deltaloom.train.rules.target import Reached
from deltaloom.train.settings import EarlyStop, TrainSettings
from deltaloom.train.strategy import PACKAGE, strategy_from

UP, DOWN = Goal("accuracy", True), Goal("loss", False)
TRAIN = TrainSettings()


def seen(values, losses=None, *, goal=UP, since=None, **facts):
    losses = losses if losses is not None else [1.0 - 0.1 * index for index in range(len(values))]
    return Seen(goal, tuple(values), tuple(losses), len(values) if since is None else since, **facts)


def actions(decision):
    return None if decision is None else list(decision.actions)


def test_stale_counts_from_the_best_and_from_the_last_change():
    assert seen([0.1, 0.5, 0.4, 0.3]).stale() == 2
    assert seen([0.1, 0.5, 0.4, 0.3], since=1).stale() == 1
    assert seen([3.0, 1.0, 2.0], goal=DOWN).stale() == 1
    assert seen([0.50, 0.51, 0.52]).stale(by=0.05) == 2
    assert seen([float("nan")] * 3).stale() == 3 and seen([float("nan")] * 3).best() is None
    assert seen([0.1, float("nan"), 0.2]).best() == 2


@pytest.mark.parametrize(("values", "facts", "acts"), [
    ([0.1, 0.2, 0.3], {}, False), ([0.3, 0.2, 0.1], {}, True), ([0.3, 0.3, 0.3], {}, True), ([0.3, 0.2], {}, False),
    ([0.3, 0.2, 0.1], {"since": 1}, False), ([0.3, 0.2, 0.1], {"acted": 2}, False)])
def test_plateau(values, facts, acts):
    assert actions(Plateau().decide(seen(values, **facts))) == ([Lower(0.5)] if acts else None)


@pytest.mark.parametrize(("losses", "facts", "wanted"), [
    ([2.0, 1.0, 0.9], {}, None), ([2.0, 1.0, 1.9], {}, None), ([2.0, 1.0, 2.1], {}, [Restore(), Lower(0.3)]), ([9.0], {}, None),
    ([2.0, 1.0, float("nan")], {}, [Restore(), Lower(0.3)]), ([2.0, 1.0, 2.1], {"acted": 2}, [Stop("diverged")])])
def test_divergence(losses, facts, wanted):
    assert actions(Divergence().decide(seen([0.5] * len(losses), losses, **facts))) == wanted


def test_a_step_that_is_not_finite_is_a_divergence_where_there_is_a_way_back():
    assert actions(Divergence().failed(seen([0.5]), "loss nan")) == [Restore(), Lower(0.3)]
    assert Divergence().failed(seen([]), "loss nan") is None
    assert actions(Divergence().failed(seen([0.5], acted=2), "loss nan")) == [Stop("diverged")]
    assert Plateau().failed(seen([0.5]), "loss nan") is None


@pytest.mark.parametrize(("values", "losses", "acts"), [
    ([0.5, 0.4, 0.4, 0.3], [1.0, 0.8, 0.6, 0.4], True), ([0.5, 0.4, 0.4, 0.3], [1.0, 1.1, 1.2, 1.3], False),
    ([0.5, 0.4, 0.5, 0.3], [1.0, 0.8, 0.6, 0.4], False), ([0.5, 0.4, 0.4], [1.0, 0.8, 0.6], False)])
def test_overfitting(values, losses, acts):
    assert actions(Overfitting().decide(seen(values, losses))) == ([Stop("overfitting")] if acts else None)


def test_the_target_is_met_or_grown_towards_or_given_up():
    assert actions(Reached().decide(seen([0.5, 0.9], target=0.9))) == [Stop("target_met", restore=False)]
    assert Reached().decide(seen([0.5, 0.8], target=0.9)) is None
    assert actions(Reached().decide(seen([3.0, 1.0], goal=DOWN, target=1.5))) == [Stop("target_met", restore=False)]
    stuck, moving = seen([0.5, 0.5, 0.5], target=0.9), seen([0.3, 0.4, 0.5], target=0.9)
    assert actions(Growth(factor=3, budget=70).decide(stuck)) == [Grow(3, 70)]
    assert actions(Biases().decide(stuck)) == [Release()]
    assert actions(GiveUp().decide(stuck)) == [Stop("target_missed")]
    for rule in (Growth(), Biases(), GiveUp()):
        assert rule.decide(moving) is None
        assert rule.decide(seen([0.95, 0.95, 0.95], target=0.9)) is None
    assert Biases().decide(seen([0.5, 0.5, 0.5], target=0.9, acted=1)) is None
    assert "nothing is left to try" in GiveUp().decide(stuck).reason


def test_noise_advises_once():
    (found,) = actions(Noise().decide(seen([0.5], noise=100.0, batch=10.0)))
    assert isinstance(found, Recommend) and "10 times" in found.text
    for quiet in ({"noise": 39.0, "batch": 10.0}, {"noise": None, "batch": None}, {"noise": 100.0, "batch": 10.0, "acted": 1}):
        assert Noise().decide(seen([0.5], **quiet)) is None
    assert Noise().decide(seen([0.5], noise=float("inf"), batch=10.0)) is not None
    assert not Noise.steers


def test_rules_have_an_order_of_their_own_each():
    plan = strategy_from({"target_metric": {"accuracy": 0.9}}, TRAIN)
    assert {rule.name for rule in plan.rules} == set(names_in(PACKAGE))
    orders = [rule.order for rule in plan.rules]
    assert orders == sorted(set(orders)) and plan.rules[0].name == "target" and plan.rules[-1].name == "give-up"


def test_a_section_says_which_rules_are_on():
    assert strategy_from(None, TRAIN) is None
    assert [rule.name for rule in strategy_from({}, TRAIN).rules] == ["noise", "divergence", "overfitting", "plateau"]
    plan = strategy_from({"plateau": {"patience": 5}, "noise": False, "overfitting": True}, TRAIN)
    assert [rule.name for rule in plan.rules] == ["divergence", "overfitting", "plateau"] and plan.rules[-1].patience == 5
    assert [method.name for method in strategy_from({"target_metric": {"loss": 1}}, TRAIN).waiting([])] == ["bitfit"]
    with_own = strategy_from({"target_metric": {"loss": 1}}, TRAIN)
    assert with_own.waiting(with_own.waiting([])) == ()
    assert plan.record() != strategy_from({}, TRAIN).record()


@pytest.mark.parametrize(("section", "text"), [
    ({"plato": {}}, "Did you mean 'plateau'"), ({"plateau": {"patience": 0}}, "strategy.plateau"),
    ({"plateau": {"patiense": 2}}, "Did you mean 'patience'"), ({"plateau": 3}, "strategy.plateau must be a mapping"),
    ({"grow": {}}, "needs a target"), ({"target_metric": 0.9}, "one metric and its value"),
    ({"target_metric": {"accuracy": 0.9, "loss": 1}}, "one metric"), ({"target_metric": {"accuracy": "high"}}, "one metric"),
    ({"plateau": False, "noise": False, "divergence": False, "overfitting": False}, "switches every rule off")])
def test_sections_that_cannot_be_are_errors(section, text):
    with pytest.raises(SettingsError, match=text):
        strategy_from(section, TRAIN)


def test_settings_of_training_that_contradict_are_errors():
    with pytest.raises(SettingsError, match="both decide when to stop"):
        strategy_from({}, TrainSettings(early_stop=EarlyStop()))
    with pytest.raises(SettingsError, match="different metrics"):
        strategy_from({"target_metric": {"accuracy": 0.9}}, TrainSettings(metric="f1"))
