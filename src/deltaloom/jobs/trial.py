"""One trial of a search: an ordinary tuning job in a folder of its own, on rows and a model that the trials of a worker share."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltaloom.checkpoint.record import DeltaRecord, read_record
from deltaloom.errors import DeltaloomError, Interrupted, NonFiniteError, RefusedError, UsageError
from deltaloom.events import Evaluated, Event, Started
from deltaloom.jobs.budget import keeps_its_size
from deltaloom.jobs.engine import Before, Here, measured, written
from deltaloom.jobs.estimate import flops_per_token
from deltaloom.jobs.opening import needs_delta
from deltaloom.jobs.prepare import Parts, Prepared, Say, parse_parts, prepare
from deltaloom.jobs.runfile import Run
from deltaloom.jobs.searchfile import SearchRun
from deltaloom.jobs.tune import add_lane, attached, carry_out, untouched_sites
from deltaloom.search.outcome import Objective, Record, pareto_front
from deltaloom.search.settings import MEASURES, Bound
from deltaloom.search.study import Asked
from deltaloom.tuned import Tuned

HEAVY = ("delta", "checkpoints", "predictions.jsonl", "tensorboard")  # what goes of a trial that is not among the best


class Ended(Exception):
    """The pruner has ended the trial."""


class Infeasible(Exception):
    """A constraint is broken by what is known before training."""

    def __init__(self, reason: str, measures: dict[str, float], excesses: dict[str, float]) -> None:
        super().__init__(reason)
        self.measures, self.excesses = measures, excesses


class Bench:
    """Rows, the model and its scores without deltas, kept from trial to trial while the settings that they depend on stay."""

    def __init__(self, bounds: Sequence[Bound] = (), say: Say = print) -> None:
        self.bounds, self.say = bounds, say
        self._key: str | None = None
        self._prepared: Prepared | None = None
        self._before: Before | None = None
        self._tuned: Tuned | None = None

    def prepare(self, run: Run, parts: Parts, *, say: Say, record: DeltaRecord | None = None) -> Prepared:
        """As `prepare.prepare`."""
        key = self._key_of(run, parts)
        if self._prepared is None or key != self._key:
            self.drop()
            self._prepared, self._key = prepare(run, parts, say=self.say, record=record), key
            self.say = silent  # once is enough
        return replace(self._prepared, run=run, parts=parts)

    def ready(self, run: Run) -> Prepared:
        """Rows and model of a run.

        Raises:
            DeltaloomError: as `prepare.prepare`, or settings are wrong.
        """
        parts = parse_parts(run)
        return self.prepare(run, parts, say=self.say,
                            record=read_record(needs_delta(parts.continued)) if parts.continued else None)

    def before(self, prepared: Prepared) -> Before:
        """What the model does without deltas."""
        if self._before is None:
            self._before = measured(prepared, prepared.loaded.model, written(prepared.task))
        return self._before

    def engine(self, prepared: Prepared) -> Here:
        """The deltas on the model, if the constraints that can be looked at now are met.

        Raises:
            Infeasible: they are not.
        """
        before = self.before(prepared)
        self._tuned = attached(prepared)
        self._check_bounds(prepared, self._tuned)
        return Here(prepared, self._tuned, self._tuned, before)

    def engine_on(self, lane: str, prepared: Prepared) -> Here:
        """The same where several trials share the model: the deltas are a lane, which is then in use."""
        before = self.before(prepared)
        if self._tuned is None:
            self._tuned = Tuned(prepared.loaded.model)
        add_lane(self._tuned, prepared, lane)
        self._check_bounds(prepared, self._tuned)
        return Here(prepared, self._tuned, self._tuned, before)

    def _check_bounds(self, prepared: Prepared, tuned: Tuned) -> None:
        found = known_measures(prepared, tuned)
        excesses = {str(bound): bound.of(prepared.model_parameters).excess(found[bound.name])
                    for bound in self.bounds if bound.name in found}
        broken = [f"{name}, but it has {found[name.split()[0]]:,.0f}" for name, excess in excesses.items() if excess > 0]
        if broken:
            raise Infeasible(f"not trained: {'; '.join(broken)}", found, excesses)

    def clear(self, lane: str | None = None) -> None:
        """Take the deltas of the last trial off, or those of a lane."""
        if self._tuned is not None and lane is None:
            self._tuned.detach()
            self._tuned = None
        elif self._tuned is not None and lane in self._tuned.lanes:
            self._tuned.remove(lane)

    def takes(self, run: Run) -> bool:
        """Whether a run needs the rows and the model that are here, or there are none yet."""
        return self._prepared is None or self._key_of(run, parse_parts(run)) == self._key

    def drop(self) -> None:
        """Forget the model: nobody knows in which state a failure left it."""
        self._key = self._prepared = self._before = self._tuned = None

    @staticmethod
    def _key_of(run: Run, parts: Parts) -> str:
        file = run.file
        return json.dumps([file.model, file.task, parts.data.as_dict(), parts.base.as_dict(), file.seed, parts.train.precision,
                           parts.train.packing, str(parts.continued)])


def known_measures(prepared: Prepared, tuned: Tuned) -> dict[str, float]:
    """What is known of a run as soon as its deltas are attached; nothing where a controller will change them."""
    deltas, heads = tuned.counts()
    if not keeps_its_size(tuned):
        return {}
    share = prepared.facts["learned_tokens"] / max(prepared.facts["tokens"], 1)
    return {"parameters": float(deltas), "flops_per_token": float(flops_per_token(untouched_sites(tuned), deltas + heads, share))}


class Watch:
    """A sink that tells the study each evaluation, and ends the run if the pruner says so."""

    def __init__(self, asked: Asked, objective: str) -> None:
        self.asked, self.objective = asked, objective
        self._total: int | None = None

    def __call__(self, event: Event) -> None:
        """Look at one event.

        Raises:
            Ended: the trial is pruned; never at the last step, where nothing would be saved.
        """
        if isinstance(event, Started):
            self._total = event.total_steps
        elif isinstance(event, Evaluated) and self.objective in event.metrics:
            value = event.metrics[self.objective]
            if self.asked.told(value) and (self._total is None or event.step < self._total):
                raise Ended(f"at step {event.step} of {self._total} its {self.objective} of {value:.4g} was behind other trials")


def carry_out_trial(run: SearchRun, objectives: Sequence[Objective], bench: Bench, asked: Asked) -> None:
    """Do a trial and close it, whatever becomes of it.

    Raises:
        Interrupted, KeyboardInterrupt: the search is to stop; the trial stays open and is done again by whoever resumes.
    """
    began = time.perf_counter()

    def result() -> dict[str, Any]:
        try:
            return carry_out(trial_run(run, asked), bench.engine, overwrite=True, say=silent, show=False,
                             make_ready=bench.prepare, sinks=[Watch(asked, objectives[0].name)])
        finally:
            bench.clear()

    if conclude(run, objectives, asked, result, lambda: time.perf_counter() - began):
        bench.drop()


def conclude(run: SearchRun, objectives: Sequence[Objective], asked: Asked, result: Callable[[], dict[str, Any]],
             seconds: Callable[[], float]) -> bool:
    """Close a trial by what its `result` is, or by what that raises; whether nobody knows in which state the model is now.

    Raises:
        Interrupted, KeyboardInterrupt: the trial stays open.
    """
    try:
        found = result()
        measures = found["metrics"] | {name: found[key] for name, key in MEASURES.items() if found[key] is not None}
        values, excesses = judged(measures, objectives, run.settings.bounds, found["total_parameters"])
    except Ended as end:
        asked.prune(str(end), seconds())
    except Infeasible as end:
        asked.refuse(str(end), end.measures, end.excesses, seconds())
    except Interrupted:
        raise
    except Exception as error:  # whatever it is, it is recorded with its reason, and the search goes on
        kind = "" if isinstance(error, DeltaloomError) else f"{type(error).__name__}: "
        asked.fail(f"{kind}{error}".strip() or type(error).__name__, seconds())
        return not isinstance(error, UsageError | NonFiniteError)
    else:
        asked.complete(values, measures, excesses, seconds())
    return False


def trial_run(run: SearchRun, asked: Asked) -> Run:
    """The run of a trial.

    Raises:
        SettingsError: its settings are not legal.
    """
    return run.run(asked.parameters, str(trial_folder(run.folder, asked.number)))


def judged(measures: dict[str, float], objectives: Sequence[Objective], bounds: Sequence[Bound],
           total: int) -> tuple[list[float], dict[str, float]]:
    """(values of the objectives, how far each constraint is exceeded); `total` are the model's parameters.

    Raises:
        RefusedError: one of them was not measured, or is no finite number.
    """
    for name in (*(objective.name for objective in objectives), *(bound.name for bound in bounds)):
        value = measures.get(name)
        if value is None or not math.isfinite(value):
            raise RefusedError(f"the trial gave no finite {name}", got=value)
    return ([float(measures[objective.name]) for objective in objectives],
            {str(bound): bound.of(total).excess(measures[bound.name]) for bound in bounds})


def trial_folder(folder: Path, number: int) -> Path:
    """Where a trial's run lies."""
    return folder / "trials" / f"{number:04d}"


def shed(folder: Path, records: Sequence[Record], objectives: Sequence[Objective]) -> None:
    """Remove what is heavy of finished trials that are not among the best; metrics, settings and events stay."""
    best = {record.number for record in pareto_front(records, objectives)}
    for record in records:
        if record.state in ("running", "waiting") or record.number in best:
            continue
        for name in HEAVY:
            path = trial_folder(folder, record.number) / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def silent(text: str = "") -> None:
    """Nobody reads the lines of single trials; their folders hold everything."""

