"""A study: the trials of one search in their storage. Several workers may hold it at once, and any of them may be killed.

A trial is asked for, told what its evaluations gave, and closed as complete, pruned, infeasible or failed. What a worker that
died was at is closed as lost, and another trial takes its settings. The sampler is made anew for each trial, from the seed and
the number of trials before, so that a search of one worker proposes the same settings whether it was interrupted or not.

Optuna prunes only where there is one objective. Where there are several, the first one is told to a study of its own beside the
real one (`NAME (pruning)`), whose trials stand for the real ones: so Optuna's pruners serve both.
"""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaloom.errors import RefusedError
from deltaloom.search.outcome import Objective, Record
from deltaloom.search.proposers import importances, make_pruner, make_sampler, need_optuna, quiet
from deltaloom.search.settings import SearchSettings
from deltaloom.search.space import Choice, Dimension, Space
from deltaloom.search.storage import open_storage, without_secret
from deltaloom.search.workers import Slot, one_at_a_time

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial

IDENTITY = "deltaloom"  # the study's attribute that says what is searched
LOST, INFEASIBLE, FAILED = "lost", "infeasible", "failed"  # states of ours
WORDS = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": FAILED, "RUNNING": "running", "WAITING": "waiting"}
MOST_DIFFERENCES = 8


class Asked:
    """A trial that this worker has been given."""

    def __init__(self, trial: Trial, watched: Trial, study: optuna.Study, watch: optuna.Study,
                 parameters: dict[str, Any]) -> None:
        self.number, self.parameters = trial.number, parameters
        self._trial, self._watched, self._study, self._watch = trial, watched, study, watch
        self._curve: list[float] = []

    def told(self, value: float) -> bool:
        """Note the first objective of the next evaluation; whether the trial should end here."""
        self._curve.append(value)
        self._trial.set_user_attr("curve", [number if math.isfinite(number) else None for number in self._curve])
        if not math.isfinite(value):
            return False
        self._watched.report(value, len(self._curve))
        with quiet():
            return self._watched.should_prune()

    def complete(self, values: Sequence[float], measures: Mapping[str, float], excesses: Mapping[str, float],
                 seconds: float) -> None:
        """Close it with the values of its objectives; `excesses` are those of the constraints, positive ones are broken."""
        broken = [name for name, excess in excesses.items() if excess > 0]
        self._note(seconds, measures=dict(measures), **({"kind": INFEASIBLE} if broken else {}))
        for name, excess in excesses.items():
            self._trial.set_constraint(name, excess)
        if broken:
            self._trial.set_user_attr("reason", f"breaks {', '.join(broken)}")
        self._close(True, values)

    def prune(self, reason: str, seconds: float) -> None:
        """Close it: it was ended early."""
        self._note(seconds, reason=reason)
        self._close(False)

    def refuse(self, reason: str, measures: Mapping[str, float], excesses: Mapping[str, float], seconds: float) -> None:
        """Close it without training: a constraint is broken by what is known before."""
        self._note(seconds, reason=reason, kind=INFEASIBLE, measures=dict(measures))
        for name, excess in excesses.items():
            self._trial.set_constraint(name, excess)
        self._close(False)

    def fail(self, reason: str, seconds: float) -> None:
        """Close it as failed.

        Optuna is told that it was pruned: samplers do not look at failed trials, and would propose what cannot work for ever.
        """
        self._note(seconds, reason=reason, kind=FAILED)
        self._close(False)

    def _note(self, seconds: float, **attributes: Any) -> None:
        for key, value in {**attributes, "seconds": seconds}.items():
            self._trial.set_user_attr(key, value)

    def _close(self, whole: bool, values: Sequence[float] | None = None) -> None:
        """The pruning study first: should this process die in between, the trial is lost and done again."""
        import optuna

        states = optuna.trial.TrialState
        with quiet():
            if self._watch is not self._study:
                own = list(values)[:1] if values is not None else None
                self._watch.tell(self._watched, own, state=states.COMPLETE if whole else states.PRUNED)
            self._study.tell(self._trial, list(values) if values is not None else None,
                             state=states.COMPLETE if whole else states.PRUNED)


@dataclass
class Study:
    """The study of one search, as one worker sees it."""

    space: Space
    settings: SearchSettings
    objectives: tuple[Objective, ...]
    seed: int
    slot: Slot
    study: optuna.Study
    watch: optuna.Study  # the same one, where there is one objective

    def next(self) -> Asked | None:
        """A trial to do, unless the budget is spent or a finite space was tried out."""
        with one_at_a_time(self.slot.folder):
            return self._next()

    def _next(self) -> Asked | None:
        import optuna

        trials = self.study.get_trials(deepcopy=False)
        lost = replaced(trials)
        kept = [trial for trial in trials if trial.number not in lost]
        if not any(trial.state == optuna.trial.TrialState.WAITING for trial in kept):
            if len(kept) >= self.settings.trials or self._time_is_up(kept):
                return None
            if self.settings.sampler == "grid" and not self._enqueue_untried(kept):
                return None
        seed = zlib.crc32(f"{self.seed} {len(kept)} {self.slot.number}".encode())
        self.study.sampler = make_sampler(self.settings.sampler, seed, self.settings.trials)
        with quiet():
            trial = self.study.ask()
            trial.set_user_attr("worker", self.slot.worker)
            watched = trial if self.watch is self.study else self.watch.ask()
            if watched is not trial:
                trial.set_user_attr("watched", watched.number)
            parameters = self.space.drawn(lambda dimension: suggested(trial, dimension))
        return Asked(trial, watched, self.study, self.watch, parameters)

    def _time_is_up(self, kept: Sequence[FrozenTrial]) -> bool:
        limit = self.settings.time_limit
        spent = sum(trial.user_attrs.get("seconds", 0.0) for trial in kept) / self.settings.workers
        return limit is not None and spent >= limit

    def _enqueue_untried(self, kept: Sequence[FrozenTrial]) -> bool:
        tried = {json.dumps(trial.params or trial.system_attrs.get("fixed_params", {}), sort_keys=True) for trial in kept}
        whole = list(self.space.assignments())
        random.Random(self.seed).shuffle(whole)
        fresh = next((each for each in whole if json.dumps(each, sort_keys=True) not in tried), None)
        if fresh is not None:
            self.study.enqueue_trial(fresh)
        return fresh is not None

    def take_back(self) -> list[int]:
        """Close the trials whose worker died, and let others take their settings; gives back the numbers of the lost."""
        import optuna

        states, lost = optuna.trial.TrialState, list[int]()
        with one_at_a_time(self.slot.folder), quiet():
            trials = self.study.get_trials(deepcopy=False)
            for trial in trials:
                if trial.state != states.RUNNING or not self.slot.gone(trial.user_attrs.get("worker")):
                    continue
                if trial.number not in replaced(trials):  # it is if a worker died between these lines
                    self.study.enqueue_trial(dict(trial.params), user_attrs={"again": trial.number})
                if self.watch is not self.study:
                    _end(self.watch, trial.user_attrs.get("watched"), states.FAIL)
                self.study.tell(trial.number, state=states.FAIL)
                lost.append(trial.number)
        return lost

    def records(self) -> list[Record]:
        """All trials."""
        trials = self.study.get_trials(deepcopy=False)
        return [self._record(trial, replaced(trials).get(trial.number)) for trial in trials]

    def _record(self, trial: FrozenTrial, successor: int | None) -> Record:
        attributes, reason = trial.user_attrs, trial.user_attrs.get("reason")
        if successor is not None:
            reason = f"its worker died; trial {successor} takes its settings"
        state = LOST if successor is not None else attributes.get("kind") or WORDS[trial.state.name]
        values: dict[str, float] = {}
        if trial.state.name == "COMPLETE" and trial.values is not None:
            values = {objective.name: value for objective, value in zip(self.objectives, trial.values, strict=True)}
        elif attributes.get("curve") and attributes["curve"][-1] is not None:
            values = {self.objectives[0].name: attributes["curve"][-1]}
        parameters = dict(trial.params or trial.system_attrs.get("fixed_params", {}))
        return Record(number=trial.number, state=state, reason=reason,
                      settings=self.space.settings(parameters), values=values, seconds=attributes.get("seconds"),
                      measures=attributes.get("measures", {}), curve=attributes.get("curve", []),
                      again=attributes.get("again"), parameters=parameters)

    def importance(self) -> dict[str, dict[str, float]]:
        """For each objective how much each setting decides, by name, the most important first."""
        return {objective.name: importances(self.study, index) for index, objective in enumerate(self.objectives)}


def open_study(place: str, name: str, *, space: Space, settings: SearchSettings, objectives: Sequence[Objective],
               identity: Mapping[str, Any], seed: int, slot: Slot, resume: bool) -> Study:
    """The study of that name in a storage, made if there is none.

    `identity` is what makes two searches the same, as JSON values by name.

    Raises:
        UsageError: Optuna is not installed. SettingsError: the storage cannot be opened.
        RefusedError: the study is of another search (says what differs), or holds trials and `resume` is off.
    """
    need_optuna()
    import optuna

    ways = optuna.study.StudyDirection
    directions = [ways.MAXIMIZE if objective.higher else ways.MINIMIZE for objective in objectives]
    with one_at_a_time(slot.folder), quiet():
        storage = check_study(place, name, identity=identity, resume=resume)
        study = optuna.create_study(study_name=name, storage=storage, directions=directions, load_if_exists=True)
        if IDENTITY not in study.user_attrs:
            study.set_user_attr(IDENTITY, dict(identity))
        watch = study
        if len(objectives) > 1:
            watch = optuna.create_study(study_name=f"{name} (pruning)", storage=storage, direction=directions[0],
                                        load_if_exists=True)
        watch.pruner = make_pruner(settings.pruner)
    return Study(space, settings, tuple(objectives), seed, slot, study, watch)


def check_study(place: str, name: str, *, identity: Mapping[str, Any], resume: bool) -> BaseStorage:
    """The storage, if a study of that name may go on or begin there.

    Raises:
        As `open_study`.
    """
    import optuna

    storage = open_storage(place)
    with quiet():
        try:
            found = optuna.load_study(study_name=name, storage=storage)
        except KeyError:
            return storage
        _check_same(found, identity, name, place)
        if found.get_trials(deepcopy=False) and not resume:
            raise RefusedError("the storage holds trials of this search", got=without_secret(place),
                               hint="Go on with --resume, or choose another search.name.")
    return storage


def suggested(trial: Trial, dimension: Dimension) -> Any:
    """What the sampler proposes."""
    if isinstance(dimension, Choice):
        return trial.suggest_categorical(dimension.name, dimension.labels)
    if dimension.kind == "int":
        return trial.suggest_int(dimension.name, int(dimension.low), int(dimension.high))
    return trial.suggest_float(dimension.name, dimension.low, dimension.high, log=dimension.kind == "log")


def replaced(trials: Sequence[FrozenTrial]) -> dict[int, int]:
    """The numbers of trials that were lost, and of those that took their settings."""
    return {trial.user_attrs["again"]: trial.number for trial in trials if "again" in trial.user_attrs}


def differences(mine: Any, theirs: Any, path: str = "") -> list[str]:
    """What differs between two JSON values, by key path."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return [line for key in dict.fromkeys([*mine, *theirs])
                for line in differences(mine.get(key), theirs.get(key), f"{path}, {key}" if path else str(key))]
    return [] if mine == theirs else [f"{path}: here {_shown(mine)}, there {_shown(theirs)}"]


def _shown(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) < 120 else text[:117] + "..."


def _check_same(study: optuna.Study, identity: Mapping[str, Any], name: str, place: str) -> None:
    theirs = study.user_attrs.get(IDENTITY)
    if theirs is None and not study.get_trials(deepcopy=False):
        return  # whoever made it was killed before it could say what it is for
    if theirs is None:
        raise RefusedError(f"the study '{name}' in this storage was not made by deltaloom", got=without_secret(place),
                           hint="Choose another search.name or search.storage.")
    found = differences(json.loads(json.dumps(identity)), theirs)
    if found:
        raise RefusedError(f"the study '{name}' in {without_secret(place)} is of another search",
                           hint="Choose another output or search.name, or replace it with --overwrite.",
                           problems=found[:MOST_DIFFERENCES])


def _end(study: optuna.Study, number: int | None, state: optuna.trial.TrialState) -> None:
    """Close a trial unless it is closed or there is none."""
    import optuna

    if number is None:
        return
    trial = next((each for each in study.get_trials(deepcopy=False) if each.number == number), None)
    if trial is not None and trial.state == optuna.trial.TrialState.RUNNING:
        study.tell(number, state=state)
