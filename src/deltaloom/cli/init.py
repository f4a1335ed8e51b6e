"""`deltaloom init`: a starter run file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Json, Verbose, give, say


def init(
    output: Annotated[Path, typer.Argument(help="The run file to write.", metavar="RUN.yaml")] = Path("run.yaml"),
    task: Annotated[str, typer.Option("--task", help="The task of the run.")] = "sequence-classification",
    model: Annotated[str | None, typer.Option("--model", help="The model; default: a bundled one that fits the task.")] = None,
    train: Annotated[str, typer.Option("--train", help="The training file.")] = "train.jsonl",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a commented run file to start from.

    Example: `deltaloom init run.yaml --task causal-lm --train train.jsonl`
    """
    from deltaloom.jobs.init import write_starter

    path = write_starter(output, task=task, model=model, train=train, overwrite=overwrite)
    say(f"Wrote {path}. Look at it, then: deltaloom plan {path}")
    give({"path": str(path)}, as_json)
