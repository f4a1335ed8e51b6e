"""`deltaloom compress MODEL -o DIR --method NAME`: a smaller model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deltaloom.cli.output import Json, Verbose, give, say

# The settings of a step are options too (--keep-first 4); they are the step's own, so that this file cannot name them.
CONTEXT: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}


def compress(
    arguments: Annotated[list[str], typer.Argument(help="A model, or a run file with a list of steps; settings of the step as "
                                                        "--key value.", metavar="MODEL|RUN.yaml [--SETTING VALUE]...")],
    method: Annotated[str | None, typer.Option("--method", "-m", help="The compressor; `deltaloom methods` lists them.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder to write; it must be new or empty.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="A setting of the step, or of "
                                                        "the rows: -s data.max_length=512. Of a run file: any key.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Calibration rows.")] = None,
    held_out: Annotated[str | None, typer.Option("--eval", help="Held-out rows, to measure before and after.")] = None,
    distil: Annotated[str | None, typer.Option("--distil", help="Rows on which the result learns from the original.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="What the model is for; default: as its head says.")] = None,
    calibration: Annotated[int | None, typer.Option("--calibration", help="Rows that steps look at; default 128.")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="stored, auto, fp32 or bf16.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of all random choices.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what the result would weigh.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make a model smaller; measures size, time and quality before and after, and writes a folder with model and report.

    Example: `deltaloom compress MODEL -o small/ --method drop-layers --ratio 0.8 --data train.jsonl --eval dev.jsonl`
    """
    from deltaloom.jobs.compress import compress as job
    from deltaloom.jobs.compressfile import run_of, split_arguments

    source, options = split_arguments(arguments)
    rows = {key: value for key, value in (("train", data), ("eval", held_out)) if value is not None}
    top = {"task": task, "calibration": calibration, "precision": precision, "seed": seed, "data": rows or None,
           "output": str(output) if output is not None else None}
    give(job(run_of(source, method, options, overrides or [], top=top, distil=distil), plan=plan, say=say), as_json)
