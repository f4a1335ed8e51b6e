"""A strategy: rules that watch a run's evaluations and change its course; every action is an event with its reason.

The loop calls `after_evaluation` before it saves, so that a checkpoint holds what came of it. All that a strategy knows is plain
numbers: a run that is resumed in the middle decides as the uninterrupted one does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltaloom.deltas.base import Controller, Method
from deltaloom.errors import SettingsError
from deltaloom.events import Acted, Emitter, Event, Step
from deltaloom.registry import class_named, names_in
from deltaloom.train.noise import NoiseMeter
from deltaloom.train.progress import Goal
from deltaloom.train.rules.base import Decision, Hand, Rule, Seen
from deltaloom.train.settings import TrainSettings
from deltaloom.tuned import Tuned
from deltaloom.tuned.attached import Attached

PACKAGE = "deltaloom.train.rules"
TARGET = "target_metric"


@dataclass(frozen=True)
class StrategyPlan:
    """The section `strategy` of a run file, checked: the rules that are on, in order, and the target if there is one."""

    rules: tuple[Rule, ...]
    metric: str | None = None
    value: float | None = None
    given: frozenset[str] = frozenset()  # rules that the run file names itself

    def record(self) -> str:
        """Everything that decides what it does, as one text: what a resumed run has to share."""
        return json.dumps({"rules": [[rule.name, rule.as_dict()] for rule in self.rules], TARGET: [self.metric, self.value]},
                          sort_keys=True)

    def waiting(self, methods: Sequence[Method]) -> tuple[Method, ...]:
        """Methods to attach after the run's own, frozen until a rule releases them; none of a kind that the run has itself."""
        own = {method.name for method in methods}
        return tuple(method for rule in self.rules for method in rule.waiting() if method.name not in own)


def strategy_from(section: Mapping[str, Any] | None, train: TrainSettings) -> StrategyPlan | None:
    """What the section says; None without one. All rules are on, those that need a target with one; `RULE: false` is off.

    Raises:
        SettingsError: an unknown rule, an illegal setting, or settings that contradict one another or those of training.
    """
    if section is None:
        return None
    metric, value = _target(section.get(TARGET), train)
    legal = names_in(PACKAGE)
    problems: list[str] = []
    rules: list[Rule] = []
    given = {key for key in section if key != TARGET and section[key] is not False}
    for key in section:
        if key != TARGET and key not in legal:
            class_named(PACKAGE, key, Rule, "key of strategy")  # type: ignore[type-abstract]  # raises, with the nearest
    for name in legal:
        cls = class_named(PACKAGE, name, Rule, "rule")  # type: ignore[type-abstract]
        settings = section.get(name, True)
        if cls.needs_target and metric is None:
            if name in given:
                problems.append(f"strategy.{name} needs a target: give strategy.{TARGET}, for example {{accuracy: 0.9}}")
            continue
        if settings is not False:
            rules.append(cls.parse({} if settings is True or settings is None else settings, f"strategy.{name}"))
    if train.early_stop is not None:
        problems.append("train.early_stop and strategy would both decide when to stop: give one of them")
    if not rules:
        problems.append("strategy switches every rule off: leave the section out instead")
    if problems:
        raise SettingsError("the strategy cannot be" if len(problems) > 1 else problems[0],
                            problems=problems if len(problems) > 1 else ())
    return StrategyPlan(tuple(sorted(rules, key=lambda rule: rule.order)), metric, value, frozenset(given))


def _target(given: Any, train: TrainSettings) -> tuple[str | None, float | None]:
    if given is None:
        return None, None
    if not isinstance(given, dict) or len(given) != 1 or not all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in given.values()):
        raise SettingsError(f"strategy.{TARGET} names one metric and its value", got=given, hint="For example: {accuracy: 0.9}")
    metric, value = next(iter(given.items()))
    if train.metric not in (None, metric):
        raise SettingsError(f"train.metric and strategy.{TARGET} judge by different metrics", got=f"{train.metric} and {metric}",
                            hint="Leave train.metric out.")
    return metric, float(value)


@dataclass
class Strategy:
    """The rules at work in one run."""

    plan: StrategyPlan
    goal: Goal
    waiting: tuple[Method, ...] = ()
    values: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    loss_sum: float = 0.0
    loss_count: int = 0
    since: int = 0
    acted: dict[str, int] = field(default_factory=dict)
    rate: float = 1.0            # factor of the learning rate
    released: bool = False
    reason: str | None = None    # why the run stops
    restores: bool = False       # whether it then ends with the best delta
    noise: NoiseMeter = field(default_factory=NoiseMeter)

    @property
    def grows(self) -> bool:
        """Whether ranks wait to be grown, instead of falling by their own schedule."""
        return any(rule.grows for rule in self.plan.rules)

    def hear(self, event: Event) -> None:
        """A sink: the losses of the steps."""
        if isinstance(event, Step):
            self.loss_sum, self.loss_count = self.loss_sum + event.loss, self.loss_count + 1

    def after_evaluation(self, metrics: Mapping[str, float], hand: Hand, emit: Emitter, step: int, *, last: bool = False) -> None:
        """Let the rules look at an evaluation, and do what the first of them wants that can be done; the `last` one only ends."""
        self.values.append(float(metrics[self.goal.metric]))
        self.losses.append(self.loss_sum / self.loss_count if self.loss_count else float("nan"))
        self.loss_sum, self.loss_count = 0.0, 0
        self.since += 1
        self._ask(lambda rule, seen: rule.decide(seen), hand, emit, step, last)
        self.noise.forget()

    def after_failure(self, message: str, hand: Hand, emit: Emitter, step: int) -> bool:
        """Let the rules answer a step that was not finite; whether one did."""
        self.loss_sum, self.loss_count = 0.0, 0
        return self._ask(lambda rule, seen: rule.failed(seen, message), hand, emit, step)

    def _ask(self, question: Callable[[Rule, Seen], Decision | None], hand: Hand, emit: Emitter, step: int,
             last: bool = False) -> bool:
        for rule in self.plan.rules:
            decision = question(rule, self._seen(rule.name))
            if decision is None or (last and not all(action.at_the_end for action in decision.actions)):
                continue
            done = [(action.name, text) for action in decision.actions if (text := action.apply(hand)) is not None]
            for name, text in done:
                emit(Acted(step=step, action=name, reason=f"{text}: {decision.reason}"))
            if done:
                self.acted[rule.name] = self.acted.get(rule.name, 0) + 1
            if done and rule.steers:
                self.since = 0
                return True
        return False

    def _seen(self, name: str) -> Seen:
        noise, batch = self.noise.read()
        return Seen(self.goal, tuple(self.values), tuple(self.losses), self.since, self.acted.get(name, 0), self.plan.value,
                    noise, batch)

    # ---- what waits ---------------------------------------------------------------------------------------------------

    def held(self, tuned: Tuned) -> list[Attached]:
        """What waits, as it is attached."""
        return [part for part in tuned.attached() if any(part.method is method for method in self.waiting)]

    def hold(self, tuned: Tuned) -> None:
        """Freeze what waits, or let it train where it was released."""
        for part in self.held(tuned):
            for _, module in part.named_deltas():
                module.requires_grad_(self.released)

    # ---- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that it knows, as plain numbers."""
        return {"values": self.values, "losses": self.losses, "loss_sum": self.loss_sum, "loss_count": self.loss_count,
                "since": self.since, "acted": self.acted, "rate": self.rate, "released": self.released, "reason": self.reason,
                "restores": self.restores, "noise": self.noise.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.values, self.losses, self.acted = list(state["values"]), list(state["losses"]), dict(state["acted"])
        self.loss_sum, self.loss_count, self.since = state["loss_sum"], state["loss_count"], state["since"]
        self.rate, self.released = state["rate"], state["released"]
        self.reason, self.restores = state["reason"], state["restores"]
        self.noise.load(state["noise"])


def check_room(strategy: Strategy, controllers: Sequence[Controller], trained: int) -> None:
    """That what the run file asks of growth can be: a method that grows, and a budget that the start is within.

    Raises:
        SettingsError: it cannot.
    """
    waiting = sum(controller.reserve() for controller in controllers)
    for rule in strategy.plan.rules:
        if rule.grows and rule.name in strategy.plan.given:
            rule.check(trained - waiting, waiting)
