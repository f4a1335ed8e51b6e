"""`deltaloom private-demo`: private tuning on one machine, in real processes, with the six bars at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Json, Overrides, Verbose, give, say


def private_demo(
    run_file: Annotated[Path, typer.Argument(help="A party's run file, whose model is the owner's.", metavar="RUN.yaml")
                        ] = Path("examples/private.yaml"),
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")] = Path("private-demo"),
    overrides: Overrides = None,
    demo: Annotated[list[str] | None, typer.Option("--size", metavar="KEY=VALUE", help="A setting of the demo itself, such as "
                                                   "rows=64, rounds=3 or middle=8.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """One owner and two parties as processes on this machine: emulator, plug-in, split tuning in rounds, and what it was worth.

    Example: `deltaloom private-demo --output demo/`
    """
    from deltaloom.jobs.private_demo import demo_settings
    from deltaloom.jobs.private_demo import private_demo as job
    from deltaloom.jobs.runfile import read_run_file

    give(job(read_run_file(run_file, overrides), output, demo_settings(demo or []), say=say), as_json)
