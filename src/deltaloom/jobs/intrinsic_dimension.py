"""The intrinsic dimension of a task: the fewest numbers that reach a share of what a run's own method reaches.

Every trial is a run folder of its own, so that a search that was cut off goes on where it was. First the run as its file says,
for each seed; then the same run with its method in a random subspace: dimensions are doubled until one is enough, halved if
the first was, and the gap is then bisected. What is enough is decided on the mean over the seeds.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaloom.deltas.intrinsic import Intrinsic
from deltaloom.errors import DeltaloomError, RefusedError, SettingsError
from deltaloom.events import finite
from deltaloom.files import write_atomic
from deltaloom.jobs.engine import LOWER_IS_BETTER
from deltaloom.jobs.prepare import parse_parts
from deltaloom.jobs.runfile import Run
from deltaloom.jobs.tune import tune
from deltaloom.report.text import figure, table_text

Say = Callable[[str], None]
SEEDS = 4096                       # the subspace's own seed is below this
EXPONENT = {"adamw": 0.5, "sgd": 0.0}  # of D / d in the rate: one step then moves theta as far as the method's own step does
PLAN, RESULT = "plan.json", "d90.json"


@dataclass(frozen=True)
class Search:
    """What is asked: the share to reach, the first dimension, when two are close enough, and what is tried for each."""

    share: float = 0.9
    start: int = 16
    precision: float = 1.25
    seeds: tuple[int, ...] = ()
    factors: tuple[float, ...] = (1.0,)
    most: int | None = None

    def __post_init__(self) -> None:
        problems = [text for text, wrong in (
            ("share must lie between 0 and 1", not 0 < self.share <= 1), ("start must be 1 or more", self.start < 1),
            ("precision must be above 1", not self.precision > 1), ("a seed comes twice", len(set(self.seeds)) < len(self.seeds)),
            ("rate factors must be above 0", not self.factors or not all(factor > 0 for factor in self.factors)),
            ("most must not be below start", self.most is not None and self.most < self.start)) if wrong]
        if problems:
            raise SettingsError("this search cannot be", problems=problems)


@dataclass
class Found:
    """All trials that are done."""

    metric: str = ""
    higher: bool = True
    parameters: int = 0                                           # D: of the method itself
    untuned: dict[int, float] = field(default_factory=dict)       # by seed
    reference: dict[int, float] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)

    def targets(self, share: float) -> dict[int, float]:
        """What each seed has to reach: a share of the reference's metric, or of how far it lowered it."""
        return {seed: share * value if self.higher else self.untuned[seed] - share * (self.untuned[seed] - value)
                for seed, value in self.reference.items()}

    def best(self, dimension: int) -> dict[int, float]:
        """The metric of each seed at a dimension: at the rate factor that is best on the mean."""
        by_factor: dict[float, dict[int, float]] = {}
        for trial in self.trials:
            if trial["dimension"] == dimension:
                by_factor.setdefault(trial["factor"], {})[trial["seed"]] = trial["metric"]
        sign = 1 if self.higher else -1
        return max(by_factor.values(), key=lambda values: sign * mean(values))

    def enough(self, values: dict[int, float], targets: dict[int, float]) -> bool:
        """Whether the mean of some seeds reaches the mean of their targets."""
        wanted, got = mean({seed: targets[seed] for seed in values}), mean(values)
        return got >= wanted if self.higher else got <= wanted


def intrinsic_dimension(run: Run, folder: Path, search: Search, *, say: Say = print) -> dict[str, Any]:
    """Find it; gives back what d90.json holds. A search of the same settings in that folder goes on.

    Raises:
        SettingsError: the run has several methods, or no evaluation rows. RefusedError: the folder holds another search, or the
        method itself gains nothing, so that there is nothing to reach.
    """
    if len(run.file.deltas) != 1 or "from" in run.file.deltas[0]:
        raise SettingsError("this takes a run of one method", got=list(run.file.deltas), hint="Search for each on its own.")
    parts = parse_parts(run)
    if parts.data.eval is None and parts.data.eval_fraction is None:
        raise SettingsError("there are no rows to judge by", hint="Give data.eval or data.eval_fraction.")
    _check_plan(folder, run, search)
    seeds, found = search.seeds or (run.file.seed,), Found()
    for seed in seeds:
        metrics = _trial(run, folder / f"method-seed{seed}", {"seed": seed}, say)
        found.metric = parts.train.metric or metrics["primary"]["name"]
        found.higher = (metrics["primary"]["higher_is_better"] if found.metric == metrics["primary"]["name"]
                        else found.metric not in LOWER_IS_BETTER)
        found.parameters = metrics["trainable_parameters"]
        found.untuned[seed], found.reference[seed] = (_number(metrics, key, found.metric) for key in ("base_metrics", "metrics"))
    if (not found.higher and mean(found.reference) >= mean(found.untuned)) or (found.higher and mean(found.reference) <= 0):
        raise RefusedError("the method itself gains nothing, so that there is no share of it to reach",
                           got=f"{found.metric} {figure(mean(found.reference))}, untuned {figure(mean(found.untuned))}")
    targets = found.targets(search.share)

    def enough(dimension: int) -> bool:
        for factor in search.factors:
            rate = parts.train.learning_rate * factor * (found.parameters / dimension) ** EXPONENT[parts.train.optimizer]
            for seed in seeds:
                name = f"d{dimension}" + (f"-rate{factor:g}" if len(search.factors) > 1 else "") + f"-seed{seed}"
                entry = {"method": Intrinsic.name, "over": dict(run.file.deltas[0]), "dimension": dimension, "seed": seed % SEEDS}
                metrics = _trial(run, folder / name, {
                    "seed": seed, "deltas": (entry,), "train": {**run.file.train, "learning_rate": rate}}, say)
                found.trials.append({"dimension": dimension, "seed": seed, "factor": factor, "learning_rate": rate,
                                     "metric": _number(metrics, "metrics", found.metric), "delta_bytes": metrics["delta_bytes"],
                                     "folder": name})
        reached = found.enough(found.best(dimension), targets)
        say(f"d = {dimension}: {found.metric} {figure(mean(found.best(dimension)))}, "
            f"{'enough' if reached else 'not enough'} (wanted {figure(mean(targets))})")
        return reached

    least = smallest(enough, search.start, min(search.most or found.parameters, found.parameters), search.precision)
    result = _result(found, search, targets, least)
    write_atomic(folder / RESULT, json.dumps(finite(result), indent=1) + "\n")
    _tell(result, folder, say)
    return finite(result)


def smallest(enough: Callable[[int], bool], start: int, most: int, precision: float) -> int | None:
    """The smallest number that is tried and is enough: doubled or halved from `start`, then bisected until it is less than
    `precision` times one that is not; None if even `most` is not. Each number is asked once."""
    number, short = min(start, most), 0
    if not enough(number):
        while True:
            if number == most:
                return None
            short, number = number, min(2 * number, most)
            if enough(number):
                break
    else:
        while number > 1:
            if not enough(number // 2):
                short = number // 2
                break
            number //= 2
    while number - short > 1 and number > short * precision:
        middle = min(max(round(math.sqrt(number * short)), short + 1), number - 1)
        number, short = (middle, short) if enough(middle) else (number, middle)
    return number


def mean(values: dict[int, float]) -> float:
    """The mean over the seeds."""
    return sum(values.values()) / len(values)


def _trial(run: Run, folder: Path, changes: dict[str, Any], say: Say) -> dict[str, Any]:
    """The metrics of one run, which is made, gone on with, or only read."""
    done = folder / "metrics.json"
    if done.is_file():
        return dict(json.loads(done.read_text(encoding="utf-8")))
    say(f"\n{folder.name}")
    one = dataclasses.replace(run, file=run.file.model_copy(update=changes | {"output": str(folder)}))
    return tune(one, resume=folder.is_dir(), say=lambda text: None)


def _number(metrics: dict[str, Any], key: str, name: str) -> float:
    value = metrics[key].get(name)
    if value is None or not math.isfinite(value):
        raise DeltaloomError(f"a trial has no finite {name}", got=value, hint="Lower train.learning_rate, or the rate factors.")
    return float(value)


def _check_plan(folder: Path, run: Run, search: Search) -> None:
    """Write what is searched for, or see that it is what was searched for before."""
    file = run.file.model_dump(mode="json")
    file.pop("output")
    plan = json.loads(json.dumps({"run": file, "search": dataclasses.asdict(search), "data": str(run.base.resolve())}))
    path = folder / PLAN
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        problems = [f"{part}.{key}: {known.get(part, {}).get(key)!r} before, {value!r} now" for part in ("run", "search")
                    for key, value in plan[part].items() if known.get(part, {}).get(key) != value]
        if known != plan:
            raise RefusedError("the folder holds another search", got=str(folder), problems=problems,
                               hint="Choose another folder with -o, or search for the same as before.")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise RefusedError("the output folder is not empty, and no search has begun there", got=str(folder),
                           hint="Choose another folder with -o.")
    write_atomic(path, json.dumps(plan, indent=1) + "\n")


def _result(found: Found, search: Search, targets: dict[int, float], least: int | None) -> dict[str, Any]:
    tried = sorted({trial["dimension"] for trial in found.trials})
    alone = {seed: next((d for d in tried if found.enough({seed: found.best(d)[seed]}, targets)), None) for seed in targets}
    return {"dimension": least, "share": search.share, "metric": found.metric, "higher_is_better": found.higher,
            "parameters": found.parameters, "untuned": mean(found.untuned), "reference": mean(found.reference),
            "target": mean(targets), "seeds": list(targets), "dimension_by_seed": {str(seed): d for seed, d in alone.items()},
            "precision": search.precision, "trials": found.trials}


def _tell(result: dict[str, Any], folder: Path, say: Say) -> None:
    rows: dict[int, list[float]] = {}
    for trial in result["trials"]:
        rows.setdefault(trial["dimension"], []).append(trial["metric"])
    say("")
    say(table_text(("d", result["metric"], "lowest", "highest"),
                   [(d, figure(sum(v) / len(v)), figure(min(v)), figure(max(v))) for d, v in sorted(rows.items())],
                   f"the method itself ({result['parameters']} numbers): {figure(result['reference'])}, "
                   f"untuned {figure(result['untuned'])}, wanted {figure(result['target'])}"))
    share = f"{result['share']:.0%}"
    say(f"{share} is reached with {result['dimension']} numbers" if result["dimension"] is not None
        else f"{share} is not reached with any dimension that was tried")
    say("One seed says nothing about the spread: give several with --seeds." if len(result["seeds"]) == 1 else
        f"Each seed alone: {', '.join(str(d) for d in result['dimension_by_seed'].values())}")
    say(f"Trials and {RESULT}: {folder}")
