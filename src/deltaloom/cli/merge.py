"""`deltaloom merge RUN_OR_DELTA -o DIR`: a plain model with the delta inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Json, Verbose, give, say


def merge(
    source: Annotated[str, typer.Argument(help="A run folder or a delta folder.", metavar="RUN_OR_DELTA")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must be new or empty.")],
    dtype: Annotated[str | None, typer.Option("--dtype", help="fp32, bf16 or fp16; default: as the base is stored.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The base, if it is not where the delta says.")] = None,
    requantise: Annotated[bool, typer.Option("--requantise", help="Keep a quantised base quantised; default: dense.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a plain model that transformers loads, with the delta folded into its weights; prints the merge error.

    Example: `deltaloom merge runs/tickets -o merged/`
    """
    from deltaloom.jobs.merge import merge as job

    give(job(source, output, dtype=dtype, model=model, requantise=requantise, say=say), as_json)
