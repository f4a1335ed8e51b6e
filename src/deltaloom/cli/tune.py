"""`deltaloom tune RUN.yaml`: train, evaluate, save."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Json, Overrides, Verbose, give, say


def tune(
    run_file: Annotated[Path, typer.Argument(help="The run file.", metavar="RUN.yaml")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left in the folder.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train a delta on the data of a run file, evaluate it, save it and write the report.

    Example: `deltaloom tune run.yaml -s train.learning_rate=5e-4`. In several processes:
    `torchrun --nproc-per-node 2 -m deltaloom tune run.yaml`
    """
    from deltaloom.jobs.runfile import read_run_file
    from deltaloom.jobs.tune import tune as job
    from deltaloom.train.processes import processes

    with processes() as team:  # opened here, so that the first process speaks for all of a wrong run file too
        run = team.together(lambda: read_run_file(run_file, overrides))
        result = job(run, resume=resume, overwrite=overwrite, say=say)
        if team.first:
            give(result, as_json)
