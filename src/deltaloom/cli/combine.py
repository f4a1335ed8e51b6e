"""`deltaloom combine D1 D2 ... --weights a,b -o DIR`: several deltas as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Json, Verbose, give, say


def combine(
    deltas: Annotated[list[str], typer.Argument(help="Run folders or delta folders of one base.", metavar="D1 D2 ...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must be new or empty.")],
    weights: Annotated[str | None, typer.Option("--weights", help="One weight a delta, e.g. 0.5,0.5; default: equal.")] = None,
    how: Annotated[str, typer.Option("--how", help="linear, ties, dare, or svd (the sum, truncated).")] = "linear",
    density: Annotated[float | None, typer.Option("--density", help="Share of the elements that ties and dare keep; default 0.5.")
                       ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Decides what dare drops.")] = 0,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Truncate to this rank; the error is printed.")] = None,
    error: Annotated[float | None, typer.Option("--error", help="Truncate to this relative error, 0 to 1.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The base, if it is not where the deltas say.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write several deltas as one low-rank delta: their weighted sum, exact by concatenating ranks, or merged by ties or dare.

    Example: `deltaloom combine runs/a runs/b --weights 0.7,0.3 -o both/`
    """
    from deltaloom.jobs.combine import combine as job

    give(job(deltas, output, weights=weights, how=how, density=density, seed=seed, rank=rank, error=error, model=model, say=say),
         as_json)
