"""`deltaloom predict RUN_OR_MODEL --data F -o OUT.jsonl`: predictions for a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Json, Overrides, Verbose, give, say


def predict(
    source: Annotated[str, typer.Argument(help="A run folder, a delta folder or a model.", metavar="RUN_OR_MODEL")],
    data: Annotated[list[Path], typer.Option("--data", help="The file with rows; targets are not needed.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write one JSON line per row.")],
    delta: Annotated[list[Path] | None, typer.Option("--delta", help="A delta to put on the model; several compose in order.")
                     ] = None,
    weights: Annotated[str | None, typer.Option("--weights", help="Several deltas' weighted sum instead, e.g. 0.5,0.5.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="The task, where neither run nor delta says it.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length limit of generated text.")] = 128,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
    overrides: Overrides = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write the model's prediction for every row of a file.

    Example: `deltaloom predict runs/tickets --data new.jsonl -o out.jsonl`
    """
    from deltaloom.jobs.predict import predict as job

    give(job(source, data, output, deltas=delta or [], weights=weights, task=task, max_new_tokens=max_new_tokens,
             overwrite=overwrite, overrides=overrides or [], say=say), as_json)
