"""`deltaloom inspect DELTA`: what a delta is, read from its files without loading the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Json, Verbose, give, say


def inspect(
    delta: Annotated[Path, typer.Argument(help="A run folder or a delta folder (native or PEFT).", metavar="DELTA")],
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Parameters, bytes, ranks per layer, norms, base and settings of a delta.

    Example: `deltaloom inspect runs/tickets/delta`
    """
    from deltaloom.jobs.inspect import inspect as job

    give(job(delta, say=say), as_json)
