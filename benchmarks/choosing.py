"""Which method, how many of its parameters, which combination: tables for docs/results; a stage goes on where it was stopped.

    python benchmarks/choosing.py low-data --data DIR --workers 2   # 100, 500, 1,000 rows of SST-2; products as another domain
    python benchmarks/choosing.py budget   --data DIR --workers 2   # `auto` against single methods of a quarter of a percent
    python benchmarks/choosing.py capacity --data DIR --workers 2   # four sizes of three methods; accuracy by length of the input
    python benchmarks/choosing.py route    --data DIR --workers 2   # films and products mixed, which is which not told
    python benchmarks/choosing.py report                            # docs/results/capacity.md

bundled:minilm in bf16, batches of 16 rows. Each candidate's rate is the one of three with the lowest loss on 500 rows of the
training file that no run trains on (seed 0); what is told are other seeds, which also draw the rows. A finished run is a line of
benchmarks/results/choices/STAGE.jsonl. DIR holds sst2.train, sst2.dev, rated.movies and rated.products.
For a trial: `--trial --folder ELSEWHERE`, 60 rows and a pass.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from choices import tables
from choices.catalogue import (
    AT_BUDGET,
    AUTO_SEEDS,
    CAPACITY,
    CAPACITY_SEEDS,
    CHOSEN_AT,
    LOW,
    LOW_SEEDS,
    ROUTE,
    ROUTE_SEEDS,
    ROWS,
    Deltas,
    rates_of,
)
from choices.runs import Spec, best_rate, line_of, trained
from evidence.runs import known_records, only_one, run_all

from deltaloom.errors import DeltaloomError

RESULTS, PAGE = Path("benchmarks/results/choices"), Path("docs/results/capacity.md")


@dataclass(frozen=True)
class Stage:
    """Candidates, seeds, and how many rows and passes; rates are chosen at `chosen_at` rows."""

    task: str
    candidates: dict[str, Deltas]
    seeds: tuple[int, ...]
    sizes: dict[int | None, float]
    chosen_at: int | None


STAGES = {
    "low-data": Stage("sst2", LOW, LOW_SEEDS, {**ROWS}, CHOSEN_AT),
    "budget": Stage("sst2", AT_BUDGET, AUTO_SEEDS, {None: 1.0}, None),
    "capacity": Stage("sst2", CAPACITY, CAPACITY_SEEDS, {None: 1.0}, None),
    "route": Stage("mixed", ROUTE, ROUTE_SEEDS, {2400: 2.0}, 2400),
}


def held_specs(stage: Stage, names: Sequence[str]) -> list[Spec]:
    """The runs that choose rates."""
    return [Spec(stage.task, "held", name, stage.candidates[name], stage.chosen_at, stage.sizes[stage.chosen_at], rate, 0)
            for name in names for rate in rates_of(name)]


def perform(name: str, given: argparse.Namespace) -> int:
    """A stage; gives back how many runs failed."""
    stage = STAGES[name]
    names = list(stage.candidates) if given.candidates is None else given.candidates
    common = {"folder": given.folder, "stage": name, "data": given.data, "workers": given.workers, "train": trained,
              "line": line_of}
    trials = [small(spec, given.trial) for spec in held_specs(stage, names)]
    tried = run_all(trials, **common)
    specs = []
    for seed in given.seeds or stage.seeds:  # seed by seed, so that a stage that is stopped has whole seeds
        for rows, passes in stage.sizes.items():
            for each in names:
                rate = best_rate(tried.values(), each)
                if rate is not None:
                    specs.append(Spec(stage.task, "dev", each, stage.candidates[each], rows, passes, rate, seed))
    specs = [small(spec, given.trial) for spec in specs]
    done = run_all(specs, **common)
    return len({spec.key for spec in [*trials, *specs]}) - len({*tried, *done})


def small(spec: Spec, trial: bool) -> Spec:
    """The same with few rows, for a trial of the script."""
    return replace(spec, rows=60, passes=1.0) if trial else spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "report"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--candidates", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--trial", action="store_true")
    given = parser.parse_args()
    try:
        if given.stage == "report":
            tables.write({name: [record for record in known_records(given.folder).values()
                                 if tables.belongs(record, stage.task, stage.candidates, stage.sizes)]
                          for name, stage in STAGES.items()}, given.page)
            return
        if given.data is None:
            parser.error("--data DIR is needed")
        if unknown := set(given.candidates or ()) - set(STAGES[given.stage].candidates):
            parser.error(f"unknown candidates {sorted(unknown)}; legal: {', '.join(STAGES[given.stage].candidates)}")
        with only_one(given.folder, given.stage):
            failed = perform(given.stage, given)
        if failed:
            sys.exit(f"{given.stage}: {failed} runs failed")
    except DeltaloomError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
