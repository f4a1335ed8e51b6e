"""`deltaloom plan RUN.yaml`: everything about a run, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Json, Overrides, Verbose, give, say


def plan(
    run_file: Annotated[Path, typer.Argument(help="The run file.", metavar="RUN.yaml")],
    overrides: Overrides = None,
    advise: Annotated[bool, typer.Option("--advise", help="Propose what the run file leaves out, with reasons.")] = False,
    budget: Annotated[list[str] | None, typer.Option(
        "--budget", help="With --advise: at most that much. 0.25% or 200000 (parameters), 4GB, 20m. Repeatable.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="With --advise: the delta is to become part of a plain model.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="With --advise: write the advised run file.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what a run would do: matched sites, parameters, memory and time, the first rows as the model will see them.

    Example: `deltaloom plan run.yaml`. What a run file leaves out is proposed by
    `deltaloom plan run.yaml --advise --budget 0.25% -o advised.yaml`, and the plan is then that of the advised run.
    """
    from deltaloom.errors import UsageError
    from deltaloom.jobs.runfile import read_run_file

    if not advise:
        if budget or merge or output is not None:
            raise UsageError("--budget, --merge and -o belong to --advise", hint="Add --advise, or leave them out.")
        from deltaloom.jobs.plan import plan as job

        give(job(read_run_file(run_file, overrides), say=say), as_json)
        return
    from deltaloom.jobs.advise import advise as advice
    from deltaloom.jobs.budget import overrides_of

    limits = overrides_of(budget or [], overrides or [])
    give(advice(read_run_file(run_file, [*(overrides or []), *limits]), merge=merge, output=output, say=say), as_json)
