"""`deltaloom search`: the trials of a search, one after another or in several processes, and what they found."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from deltaloom.errors import DeltaloomError, RefusedError, SettingsError
from deltaloom.events import finite
from deltaloom.files import write_atomic
from deltaloom.jobs.cohort import carry_out_together
from deltaloom.jobs.doctor import environment
from deltaloom.jobs.engine import LOWER_IS_BETTER, goal_of
from deltaloom.jobs.folder import check_folder, clear_folder, write_json
from deltaloom.jobs.prepare import Prepared, Say, model_source, parse_parts
from deltaloom.jobs.searchfile import SearchRun, objectives_of, static_combinations
from deltaloom.jobs.trial import Bench, carry_out_trial, known_measures, shed, trial_folder
from deltaloom.jobs.tune import attached, seen_from
from deltaloom.private.process import shared_environment
from deltaloom.report.search import search_page, search_text, trial_line
from deltaloom.search.outcome import Objective, Record, best_of, pareto_front
from deltaloom.search.proposers import need_optuna
from deltaloom.search.settings import Bound
from deltaloom.search.storage import without_secret
from deltaloom.search.study import Asked, Study, check_study, open_study
from deltaloom.search.workers import Slot, busy

OWN = ("search.json", "best.yaml", "report.html", "journal.log", "journal.log.lock", "trials", "workers", "best")
MOST_ATTACHED = 64  # combinations that are attached before the search to see whether a constraint can be met


def search(run: SearchRun, *, resume: bool = False, overwrite: bool = False, say: Say = print) -> dict[str, Any]:
    """Search as a run file says; gives back what search.json holds.

    Raises:
        UsageError: settings, space, data or storage are wrong; nothing was trained.
        DeltaloomError: no trial came to an end within the constraints; the report and search.json say why.
        Interrupted: everything is kept; go on with `resume`.
    """
    need_optuna()
    folder = run.folder
    check_folder(folder, resume=resume, overwrite=overwrite, own=OWN, mark="search.json")
    if resume and (folder / "run.yaml").exists():
        raise RefusedError("this folder holds a run, not a search", got=str(folder), hint="Choose another output.")
    if overwrite and busy(folder):
        raise RefusedError("a search is running in this folder", got=str(folder), hint="Stop it, or choose another output.")
    bench = Bench(run.settings.bounds, say)
    objectives = _looked_over(run, bench, say)
    if run.settings.storage:
        check_study(run.settings.storage, run.settings.name or folder.name, identity=run.identity(objectives), resume=resume)
    if not resume:
        clear_folder(folder, OWN)
    with _slot(folder) as slot, _threads(run.settings.workers):
        study = open_search(run, objectives, slot, resume=resume)
        _tell_plan(run, study, objectives, say)
        helpers = [_helper(run, objectives) for _ in range(run.settings.workers - 1)]
        try:
            work(run, study, bench, say)
            for helper in helpers:
                if helper.wait() not in (0, 130):
                    say("warning: a worker ended badly; what it was at is done here")
            work(run, study, bench, say)
        finally:
            for helper in helpers:
                helper.terminate()
                helper.wait()
        return _concluded(run, study, bench, say)


def open_search(run: SearchRun, objectives: Sequence[Objective], slot: Slot, *, resume: bool) -> Study:
    """The study of a search, as its run file says where it is kept."""
    settings, folder = run.settings, run.folder
    return open_study(settings.storage or str(folder / "journal.log"), settings.name or folder.name, space=run.space,
                      settings=settings, objectives=objectives, identity=run.identity(objectives), seed=run.seed, slot=slot,
                      resume=resume)


def work(run: SearchRun, study: Study, bench: Bench, say: Say) -> None:
    """Do trials until the budget is spent."""
    for number in study.take_back():
        say(f"trial {number} was cut off; its settings are tried again")

    def done(asked: Asked) -> None:
        records = study.records()
        say(trial_line(records, asked.number, study.objectives, run.settings.trials))
        if run.settings.keep == "best":
            shed(run.folder, records, study.objectives)

    if run.settings.cohort > 1:
        carry_out_together(run, study, bench, done)
        return
    while (asked := study.next()) is not None:
        carry_out_trial(run, study.objectives, bench, asked)
        done(asked)


def _looked_over(run: SearchRun, bench: Bench, say: Say) -> tuple[Objective, ...]:
    """The objectives, after everything that can be wrong was looked at.

    Raises:
        SettingsError: a name that nothing measures, or a constraint that nothing can meet.
    """
    prepared = bench.ready(run.run(run.first))
    if not prepared.held:
        raise SettingsError("a search compares trials on evaluation rows, but there are none", hint="Give data.eval.")
    metrics = list(bench.before(prepared).scores.metrics)
    objectives = objectives_of(run, prepared.parts, metrics, goal_of(prepared), LOWER_IS_BETTER)
    _check_constraints(run, bench, prepared, say)
    return objectives


def _check_constraints(run: SearchRun, bench: Bench, prepared: Prepared, say: Say) -> None:
    """That some combination can meet the constraints on what is known before training."""
    found = static_combinations(run, MOST_ATTACHED)
    if found is None:
        return
    combinations, whole = found
    say(f"Constraints: looking at the sizes of {len(combinations)} combinations")
    closest: dict[str, float] = {}
    for parameters in combinations:
        try:
            tuned = attached(bench.ready(run.run(parameters)))
        except DeltaloomError:
            continue  # a trial of this combination will say why
        try:
            measures = known_measures(prepared, tuned)
        finally:
            tuned.detach()
        bounds = [bound.of(prepared.model_parameters) for bound in run.settings.bounds]
        if all(bound.excess(measures[bound.name]) <= 0 for bound in bounds if bound.name in measures):
            return
        closest = _closer(closest, measures, bounds)
    if closest and whole:
        raise SettingsError("nothing of the space meets the constraints",
                            problems=[f"{bound}: the closest has {closest[bound.name]:,.0f}"
                                      for bound in run.settings.bounds if bound.name in closest])
    if closest:
        say(f"warning: none of {len(combinations)} combinations that were looked at meets the constraints")


def _closer(closest: dict[str, float], measures: Mapping[str, float], bounds: Sequence[Bound]) -> dict[str, float]:
    """For each bounded measure the value that came closest to its bound so far."""
    return {bound.name: min((value for value in (closest.get(bound.name), measures[bound.name]) if value is not None),
                            key=bound.excess) for bound in bounds if bound.name in measures}


@contextmanager
def _slot(folder: Path) -> Iterator[Slot]:
    slot = Slot.take(folder)
    try:
        yield slot
    finally:
        slot.close()


@contextmanager
def _threads(workers: int) -> Iterator[None]:
    """This process's share of the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _helper(run: SearchRun, objectives: Sequence[Objective]) -> subprocess.Popen[str]:
    """A further worker; it is told on its standard input what this process has read and checked."""
    task = {"template": run.space.values_as_written(), "search": run.settings.as_dict(), "base": str(run.base), "name": run.name,
            "objectives": [[objective.name, objective.higher] for objective in objectives]}
    helper = subprocess.Popen([sys.executable, "-m", "deltaloom.jobs.search_worker"], stdin=subprocess.PIPE, text=True,
                              stdout=subprocess.DEVNULL, env=shared_environment(threads=torch.get_num_threads()))
    if helper.stdin is not None:
        helper.stdin.write(json.dumps(task))
        helper.stdin.close()
    return helper


def _tell_plan(run: SearchRun, study: Study, objectives: Sequence[Objective], say: Say) -> None:
    done = sum(record.state in ("complete", "pruned", "infeasible", "failed") for record in study.records())
    size = run.space.size
    wanted = ", ".join(f"{objective.name} ({'highest' if objective.higher else 'lowest'})" for objective in objectives)
    say(f"Search: {run.settings.trials} trials" + (f" ({done} done)" if done else "") + f" for {wanted}; "
        f"{len(run.space.dimensions)} open values" + (f", {size:,} combinations" if size is not None else "")
        + (f"; {run.settings.cohort} trials at once" if run.settings.cohort > 1 else "")
        + f"; sampler {run.settings.sampler}, pruner {run.settings.pruner}")


def _concluded(run: SearchRun, study: Study, bench: Bench, say: Say) -> dict[str, Any]:
    """Write what was found.

    Raises:
        DeltaloomError: no trial is complete and within the constraints.
    """
    records, folder, objectives = study.records(), run.folder, study.objectives
    best = best_of(records, objectives)
    front = pareto_front(records, objectives)
    settings = run.settings.as_dict()
    if settings["storage"]:
        settings["storage"] = without_secret(settings["storage"])
    found = finite({
        "run": folder.name, "best": _best(run, best, objectives), "trials": [record.as_dict() for record in records],
        "pareto": [{"number": record.number, "settings": record.settings, "values": record.values} for record in front],
        "objectives": [{"name": objective.name, "higher_is_better": objective.higher} for objective in objectives],
        "space": run.space.described(), "search": settings, "importance": study.importance(),
        "seconds": sum(record.seconds or 0.0 for record in records),
        "environment": environment() | {"threads": torch.get_num_threads()}})
    if best is not None:
        write_atomic(folder / "best.yaml", best_file(run, best, objectives))
    write_json(folder / "search.json", found)
    write_atomic(folder / "report.html", search_page(folder.name, found))
    say("")
    say(search_text(found))
    say(f"Report: {folder / 'report.html'}")
    if best is None:
        raise _nothing(records, folder)
    say(f"Best:   {folder / 'best.yaml'}; its run is {trial_folder(folder, best.number)}")
    return found


def _best(run: SearchRun, best: Record | None, objectives: Sequence[Objective]) -> dict[str, Any] | None:
    if best is None:
        return None
    return {"number": best.number, "settings": best.settings, "value": best.values[objectives[0].name], "values": best.values,
            "run": str(trial_folder(run.folder, best.number)), "file": str(run.folder / "best.yaml")}


def best_file(run: SearchRun, best: Record, objectives: Sequence[Objective]) -> str:
    """The run file of a trial, to be run from the search's folder."""
    folder = run.folder
    ordinary = run.run(best.parameters)
    values = run.space.values(best.parameters)
    values["data"] = {key: seen_from(folder, value, run.base) if key in ("train", "eval") else value
                      for key, value in values["data"].items()}
    if model_source(ordinary) != ordinary.file.model:
        values["model"] = seen_from(folder, ordinary.file.model, run.base)
    continued = parse_parts(ordinary).continued
    if continued is not None:
        values["deltas"] = [{"from": seen_from(folder, str(continued), Path.cwd())}]
    values["output"] = str(folder / "best")
    said = ", ".join(f"{name} {value:.6g}" for name, value in best.values.items())
    return (f"# Trial {best.number} of the search in {folder.name}: {said}. Run it with `deltaloom tune`.\n"
            + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120))


def _nothing(records: Sequence[Record], folder: Path) -> DeltaloomError:
    reasons = [f"trial {record.number} ({record.state}): {record.reason}" for record in records if record.reason]
    infeasible = any(record.state == "infeasible" for record in records)
    return DeltaloomError("no trial meets the constraints" if infeasible else "no trial came to its end",
                          got=f"{len(records)} trials", hint=f"{folder / 'report.html'} shows them all.", problems=reasons[:8])
