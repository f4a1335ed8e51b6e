"""What commands print: one JSON object on standard output with --json, everything for people on standard error."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from deltaloom.events import finite

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show a traceback if something fails.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE",
                                                      help="Override a value of the run file, e.g. -s train.learning_rate=5e-4.")]


def say(text: str = "") -> None:
    """A line for people."""
    sys.stderr.write(text + "\n")


def give(result: dict[str, Any], as_json: bool) -> None:
    """The result as one JSON object, if it was asked for."""
    if as_json:
        sys.stdout.write(json.dumps(finite(result), ensure_ascii=False) + "\n")
