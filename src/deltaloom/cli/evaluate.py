"""`deltaloom eval RUN_OR_MODEL --data F`: metrics on a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Json, Overrides, Verbose, give, say


def evaluate(
    source: Annotated[str, typer.Argument(help="A run folder, a delta folder or a model.", metavar="RUN_OR_MODEL")],
    data: Annotated[list[Path], typer.Option("--data", help="The file with rows and their targets; may be repeated.")],
    delta: Annotated[list[Path] | None, typer.Option("--delta", help="A delta to put on the model; several compose in order.")
                     ] = None,
    weights: Annotated[str | None, typer.Option("--weights", help="Several deltas' weighted sum instead, e.g. 0.5,0.5.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="The task, where neither run nor delta says it.")] = None,
    overrides: Overrides = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Metrics on a file, per class where there are classes, with 95% bootstrap intervals.

    Example: `deltaloom eval runs/tickets --data test.jsonl`
    """
    from deltaloom.jobs.evaluate import evaluate as job

    give(job(source, data, deltas=delta or [], weights=weights, task=task, overrides=overrides or [], say=say), as_json)
