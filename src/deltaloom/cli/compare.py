"""`deltaloom compare RUN RUN`: several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Json, Verbose, give, say


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN RUN ...")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write an HTML page.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Metrics, sizes, speed and the settings that differ, side by side.

    Example: `deltaloom compare runs/a runs/b`
    """
    from deltaloom.jobs.folder import check_runs
    from deltaloom.report.compare import compare_runs
    from deltaloom.report.page import write_report

    check_runs(runs)
    found = compare_runs(runs)
    say(found.text())
    result = found.as_dict()
    if output is not None:
        result["path"] = str(write_report(runs, output))
        say(f"Report: {output}")
    give(result, as_json)
