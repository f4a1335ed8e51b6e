"""`deltaloom convert DELTA --to FORMAT -o DIR`: a delta in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Json, Verbose, give, say


def convert(
    delta: Annotated[str, typer.Argument(help="A run folder or a delta folder (native or PEFT).", metavar="DELTA")],
    to: Annotated[str, typer.Option("--to", help="peft, lora (a plain low-rank delta) or native.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must be new or empty.")],
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Truncate to this rank; the error is printed.")] = None,
    error: Annotated[float | None, typer.Option("--error", help="Truncate to the fewest ranks with at most this relative "
                                                "error, such as 0.1.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The base, if it is not where the delta says.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a delta in another format, with the error of any truncation.

    Example: `deltaloom convert runs/tickets/delta --to peft -o peft/`
    """
    from deltaloom.jobs.convert import convert as job

    give(job(delta, to, output, rank=rank, error=error, model=model, say=say), as_json)
