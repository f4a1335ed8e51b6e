"""`deltaloom subspace d90 RUN.yaml` and `deltaloom subspace learn RUN RUN ... -o DIR`: how few numbers a task needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Json, Overrides, Verbose, give, say

app = typer.Typer(no_args_is_help=True, help="Subspaces: the intrinsic dimension of a task; prompts of a few numbers.")


@app.command("d90")
def d90(
    run_file: Annotated[Path, typer.Argument(help="A run file with one method.", metavar="RUN.yaml")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the trials; a search there goes on.")],
    overrides: Overrides = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="Seeds, e.g. 0,1,2; default: the run's own.")] = None,
    share: Annotated[float, typer.Option("--share", help="Share of the method's metric that is wanted.")] = 0.9,
    start: Annotated[int, typer.Option("--start", min=1, help="First dimension; doubled until it is enough.")] = 16,
    most: Annotated[int | None, typer.Option("--most", min=1, help="Largest dimension; default: the method's numbers.")] = None,
    precision: Annotated[float, typer.Option("--precision", help="Bisect until a dimension that is enough is less than so many "
                                                                 "times one that is not.")] = 1.25,
    rates: Annotated[str, typer.Option("--rates", help="Factors of the learning rate to try, e.g. 0.3,1,3.")] = "1",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Find the intrinsic dimension of a task: the fewest numbers that reach 90% of what the run's method reaches.

    Example: `deltaloom subspace d90 run.yaml -o runs/d90 --seeds 0,1,2`
    """
    from deltaloom.jobs.intrinsic_dimension import Search, intrinsic_dimension
    from deltaloom.jobs.runfile import read_run_file

    search = Search(share, start, precision, tuple(_numbers(seeds, int, "--seeds")),
                    tuple(_numbers(rates, float, "--rates")), most)
    give(intrinsic_dimension(read_run_file(run_file, overrides), output, search, say=say), as_json)


@app.command("learn")
def learn(
    runs: Annotated[list[str], typer.Argument(help="Run folders whose deltas are prompts of one model.", metavar="RUN RUN ...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must be new or empty.")],
    numbers: Annotated[int, typer.Option("--numbers", min=1, help="Trained numbers of a task at most.")] = 250,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Learn from the prompts of several tasks a decoder with which a new task takes a few numbers.

    Example: `deltaloom subspace learn runs/a runs/b runs/c -o decoder`
    """
    from deltaloom.jobs.prompt_subspace import learn as job

    give(job(runs, output, numbers=numbers, say=say), as_json)


def _numbers(text: str | None, kind: type, option: str) -> list:
    from deltaloom.errors import SettingsError

    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        raise SettingsError(f"{option} takes numbers, separated by commas", got=text) from None
