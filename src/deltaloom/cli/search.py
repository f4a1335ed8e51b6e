"""`deltaloom search RUN.yaml`: hyper-parameters, methods and combinations under budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Json, Overrides, Verbose, give, say


def search(
    run_file: Annotated[Path, typer.Argument(help="A run file with open values and, if wanted, a section search.",
                                             metavar="RUN.yaml")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in the output folder, or join it as a further "
                                                          "worker.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier search left in the folder.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Try out the open values of a run file, and write the best as a run file of its own.

    Example: `deltaloom search run.yaml -s search.trials=32`
    """
    from deltaloom.jobs.search import search as job
    from deltaloom.jobs.searchfile import read_search_file

    give(job(read_search_file(run_file, overrides or []), resume=resume, overwrite=overwrite, say=say), as_json)
