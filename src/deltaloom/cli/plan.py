"""`deltaloom plan RUN.yaml`: everything about a run, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Json, Overrides, Verbose, give, say


def plan(
    run_file: Annotated[Path, typer.Argument(help="The run file.", metavar="RUN.yaml")],
    overrides: Overrides = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what a run would do: matched sites, parameters, memory and time, the first rows as the model will see them.

    Example: `deltaloom plan run.yaml`
    """
    from deltaloom.jobs.plan import plan as job
    from deltaloom.jobs.runfile import read_run_file

    give(job(read_run_file(run_file, overrides), say=say), as_json)
