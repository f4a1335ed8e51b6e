"""The run file of a search: what is settled, what is open, and how to search; and the checks that need no model."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from deltaloom.data.settings import DataSettings, files_of, resolved
from deltaloom.errors import DeltaloomError, SettingsError
from deltaloom.jobs.prepare import Parts, parse_parts
from deltaloom.jobs.runfile import MALFORMED, Run, RunFile, apply_override, parse_run, plain, read_mapping
from deltaloom.search.outcome import Objective
from deltaloom.search.proposers import check_sampler
from deltaloom.search.settings import BEFORE_TRAINING, MEASURES, SearchSettings
from deltaloom.search.space import Choice, Space, parse_space
from deltaloom.train.settings import seconds

KEYS = (*RunFile.model_fields, "search")
MOST_LOOKED_AT = 400    # combinations whose settings are checked before anything is trained
MOST_GRID = 10_000
SEEN_ENOUGH = 4         # combinations in which a value is always refused before it is blamed, where not all are looked at


@dataclass(frozen=True)
class SearchRun:
    """A parsed run file of a search."""

    settings: SearchSettings
    space: Space
    base: Path  # where relative data paths start
    name: str

    def run(self, parameters: dict[str, Any], output: str | None = None) -> Run:
        """The ordinary run of one combination.

        Raises:
            SettingsError: its settings are not legal.
        """
        values = self.space.values(parameters)
        return parse_run(values if output is None else values | {"output": output}, base=self.base, name=self.name)

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.space.template.get("output") or f"runs/{self.name}")

    @property
    def seed(self) -> int:
        """Of the sampler."""
        own = self.settings.seed
        return int(self.space.template.get("seed") or 0) if own is None else own

    @property
    def first(self) -> dict[str, Any]:
        """The parameters of one combination that is legal."""
        return next(parameters for parameters in _looked_at(self)[0] if _fault(self, parameters) is None)

    def identity(self, objectives: Sequence[Objective]) -> dict[str, Any]:
        """What makes two searches the same: rows, settled values, space, objectives, constraints."""
        fixed = {key: value for key, value in self.space.fixed().items() if key != "output"}
        return {"run file": fixed, "space": self.space.described(),
                "objectives": {objective.name: "highest" if objective.higher else "lowest" for objective in objectives},
                "constraints": self.settings.constraints, "search.seed": self.seed,
                "rows": self._digests(DataSettings.parse(self.space.values(self.first)["data"], "data"))}

    def _digests(self, data: DataSettings) -> dict[str, str]:
        found = {}
        for name in (*files_of(data.train), *files_of(data.eval)):
            path = resolved(name, self.base)
            if path.is_file():
                with path.open("rb") as file:
                    found[name] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return found


def read_search_file(path: Path, overrides: Sequence[str] = ()) -> SearchRun:
    """A run file with `key.path=value` overrides applied.

    Raises:
        SettingsError: no file, no YAML mapping, an unknown key, a space or search settings that are wrong.
    """
    values = read_mapping(path, KEYS)
    values.pop("origins", None)
    for override in overrides:
        apply_override(values, override, KEYS)
    return parse_search(values, base=path.resolve().parent, name=path.stem)


def parse_search(values: dict[str, Any], *, base: Path, name: str = "search") -> SearchRun:
    """The same from a mapping, as a library user has it; the mapping stays as it is.

    Raises:
        SettingsError: as `read_search_file`.
    """
    try:
        values = plain(values)
    except MALFORMED as error:
        raise SettingsError(f"run: {error or type(error).__name__}") from None
    settings = SearchSettings.parse(values.pop("search", {}), "search")
    space = parse_space(values)
    run = SearchRun(settings, space, base, name)
    check_sampler(settings.sampler)
    _check_values(run)
    parts = parse_parts(run.run(run.first))
    _check_budgets(run, parts)
    return run


def objectives_of(run: SearchRun, parts: Parts, metrics: Sequence[str], goal: tuple[str, bool],
                  lower: Sequence[str]) -> tuple[Objective, ...]:
    """What is searched for: `metrics` are those of the task, `goal` is the one that judges a run, `lower` are better if lower.

    Raises:
        SettingsError: an objective or a constraint names nothing that is measured, or the pruner sees nothing.
    """
    legal = [*metrics, *MEASURES]
    names = run.settings.objectives or (goal[0],)
    strange = [f"search.objectives: {name}" for name in names if name not in legal]
    strange += [f"search.constraints: {name}" for name in run.settings.constraints if name not in legal]
    if strange:
        raise SettingsError("the search names what no trial measures", got=", ".join(strange), legal=legal)
    if run.settings.pruner != "none" and names[0] not in metrics:
        raise SettingsError("search.pruner looks at evaluations, but the first objective is no metric of them", got=names[0],
                            legal=metrics, hint="Put a metric first, or write pruner: none.")
    kind = parts.task
    higher = {kind.primary: kind.higher_is_better, goal[0]: goal[1]}
    return tuple(Objective(name, higher.get(name, name not in lower and name not in MEASURES)) for name in names)


def static_combinations(run: SearchRun, most: int) -> tuple[list[dict[str, Any]], bool] | None:
    """(combinations that differ in what is attached, at most so many; whether these are all). None if nothing can be said.

    Only for a space whose model is settled and that bounds what is known before training.
    """
    if not any(bound.name in BEFORE_TRAINING for bound in run.settings.bounds):
        return None
    template = run.space.template
    if Space({key: template[key] for key in ("model", "base") if key in template}).dimensions:
        return None
    deltas = Space({"deltas": template["deltas"]})
    first, size = run.first, deltas.size
    whole = size is not None and size <= most
    found = list(islice(_combinations(deltas, most, whole=whole), most))
    return [first | parameters for parameters in found], whole


def _combinations(space: Space, most: int, *, whole: bool) -> Iterator[dict[str, Any]]:
    """All combinations of a small space; of a large one some at random, with numbers at the ends of their intervals."""
    if whole:
        yield from space.assignments()
        return
    generator = random.Random(0)
    for _ in range(most):
        yield space.drawn(lambda dimension: generator.choice(dimension.labels if isinstance(dimension, Choice)
                                                             else [dimension.low, dimension.high]))


def _looked_at(run: SearchRun) -> tuple[list[dict[str, Any]], bool]:
    """(combinations to check, with intervals at their ends; whether these are all)."""
    found = list(islice(run.space.assignments(corners=True), MOST_LOOKED_AT + 1))
    if len(found) <= MOST_LOOKED_AT:
        return found, True
    return list(_combinations(run.space, MOST_LOOKED_AT, whole=False)), False


def _fault(run: SearchRun, parameters: dict[str, Any]) -> str | None:
    try:
        parse_parts(run.run(parameters))
    except DeltaloomError as error:
        return str(error)
    return None


def _check_values(run: SearchRun) -> None:
    """That no value of the space is illegal whatever the others are; combinations that are become failed trials.

    Raises:
        SettingsError: some are, or nothing of the space is legal.
    """
    combinations, whole = _looked_at(run)
    faults = [_fault(run, parameters) for parameters in combinations]
    if all(fault is not None for fault in faults):
        reasons = list(dict.fromkeys(fault for fault in faults if fault))
        raise SettingsError("no combination of the space is a legal run", problems=reasons[:8])
    seen: dict[tuple[str, str], list[str | None]] = {}
    for parameters, fault in zip(combinations, faults, strict=True):
        for name, value in parameters.items():
            seen.setdefault((name, json.dumps(value)), []).append(fault)
    least = 1 if whole else SEEN_ENOUGH
    problems = [f"{name} {value}: {found[0]}" for (name, value), found in seen.items()
                if len(found) >= least and all(fault is not None for fault in found)]
    if problems:
        raise SettingsError("values of the space are never legal", problems=problems)


def _check_budgets(run: SearchRun, parts: Parts) -> None:
    settings, limit = run.settings, run.settings.time_limit
    data = parts.data
    if data.eval is None and data.eval_fraction is None:
        raise SettingsError("a search compares trials on evaluation rows, but there are none",
                            hint="Give data.eval or data.eval_fraction.")
    train = run.space.template.get("train", {})
    each = train.get("max_time") if isinstance(train, dict) else None
    if limit is not None and isinstance(each, str | int | float):
        longest = seconds(each) if isinstance(each, str) else float(each)
        if longest > limit:
            raise SettingsError("contradictory budgets: one trial may take longer than the search", got=f"train.max_time: {each}",
                                legal=f"at most search.time: {settings.time}")
    size = run.space.size
    if settings.sampler == "grid" and (size is None or size > MOST_GRID):
        raise SettingsError("search.sampler: grid tries out every combination, but there are too many of them",
                            got="intervals of real numbers" if size is None else f"{size} combinations",
                            legal=f"a space of {{choice: [...]}} and {{int: [...]}} with up to {MOST_GRID}")
