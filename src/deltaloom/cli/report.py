"""`deltaloom report RUN [RUN ...] -o F.html`: one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Json, Verbose, give, say


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN [RUN ...]")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write one self-contained HTML page about one or several runs.

    Example: `deltaloom report runs/a runs/b -o report.html`
    """
    from deltaloom.jobs.folder import check_runs
    from deltaloom.report.page import write_report

    check_runs(runs)
    path = write_report(runs, output)
    say(f"Report: {path}")
    give({"path": str(path)}, as_json)
