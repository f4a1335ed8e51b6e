"""`deltaloom combine D1 D2 ... --weights a,b -o DIR`: a weighted sum of deltas."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Json, Verbose, give, say


def combine(
    deltas: Annotated[list[str], typer.Argument(help="Run folders or delta folders of one base.", metavar="D1 D2 ...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must be new or empty.")],
    weights: Annotated[str | None, typer.Option("--weights", help="One weight a delta, e.g. 0.5,0.5; default: equal.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Truncate to this rank; the error is printed.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The base, if it is not where the deltas say.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write the weighted sum of several deltas as one low-rank delta, exact by concatenating ranks.

    Example: `deltaloom combine runs/a runs/b --weights 0.7,0.3 -o both/`
    """
    from deltaloom.jobs.combine import combine as job

    give(job(deltas, output, weights=weights, rank=rank, model=model, say=say), as_json)
