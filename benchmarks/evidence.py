"""Evidence for the adaptive-rank and tensor methods; every stage is one command, and goes on where it was stopped.

    python benchmarks/evidence.py screen --data DIR --workers 2   # SST-2: every variant at two rates, on rows held out of train
    python benchmarks/evidence.py finals --data DIR --workers 2   # SST-2 dev: the screen's best and the others, fresh seeds
    python benchmarks/evidence.py e2e    --data DIR --workers 2   # E2E: loss and BLEU
    python benchmarks/evidence.py depth  --data DIR               # what layers share over depth
    python benchmarks/evidence.py report                          # docs/results/adaptive.md and its drawings

Each finished run is a line of benchmarks/results/evidence/STAGE.jsonl. What is compared is in evidence/catalogue.py. For a trial:
`--limit ROWS --folder ELSEWHERE --candidates lora dora`, for the report too. DIR holds sst2 and e2e, train and dev.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from evidence import stages
from evidence.catalogue import BUDGETS, MODELS
from evidence.runs import append, known_records, only_one, read_lines

from deltaloom.errors import DeltaloomError

RESULTS = Path("benchmarks/results/evidence")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="stage", required=True)
    for name in ("screen", "finals", "e2e", "depth", "report"):
        command = commands.add_parser(name)
        command.add_argument("--folder", type=Path, default=RESULTS, help="where the JSON lines are")
        command.add_argument("--limit", type=int, help="rows, for a trial of the scripts")
        if name == "report":
            command.add_argument("--page", type=Path, default=Path("docs/results/adaptive.md"))
            command.add_argument("--steps", type=Path, default=Path("benchmarks/results/adaptive_steps.json"))
            continue
        command.add_argument("--data", type=Path, required=True)
        if name == "depth":
            command.add_argument("--tasks", nargs="+", choices=MODELS, default=list(MODELS))
            continue
        command.add_argument("--workers", type=int, default=1)
        command.add_argument("--candidates", nargs="+")
        command.add_argument("--budgets", nargs="+", choices=BUDGETS)
        command.add_argument("--rates", type=float, nargs="+")
        command.add_argument("--seeds", type=int, nargs="+")
    return parser.parse_args()


def train(given: argparse.Namespace) -> None:
    """The stages of many runs.

    Raises:
        SystemExit: runs failed; they are tried again at the next start.
    """
    listed = {key: tuple(value) if value else None for key, value in vars(given).items()
              if key in ("candidates", "budgets", "rates", "seeds")}
    options = stages.Options(given.data, given.folder, given.workers, limit=given.limit, **listed)
    if given.stage == "screen":
        failed = stages.screen(options)
    else:
        failed = (stages.finals if given.stage == "finals" else stages.e2e)(options, known_records(given.folder))
    if failed:
        sys.exit(f"{given.stage}: {failed} runs failed")


def depth(given: argparse.Namespace) -> None:
    """Both kinds of matrices for each task that is not measured yet."""
    from evidence.depth import depth_records

    done = {(record["depth"], record["limit"]) for record in read_lines(given.folder / "depth.jsonl")}
    for task in given.tasks:
        if (task, given.limit) not in done:
            for record in depth_records(task, given.data, given.limit):
                append(given.folder / "depth.jsonl", record)
                print(f"depth {task}: {record['source']}, {len(record['groups'])} groups", flush=True)


def main() -> None:
    given = parsed()
    try:
        if given.stage == "report":
            from evidence.report import write

            write(given.folder, given.page, given.steps, given.limit)
            return
        with only_one(given.folder, given.stage):
            (depth if given.stage == "depth" else train)(given)
    except DeltaloomError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
