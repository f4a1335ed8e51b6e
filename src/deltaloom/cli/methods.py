"""`deltaloom methods [NAME]`: the methods and their settings."""

from __future__ import annotations

from typing import Annotated

import typer

from deltaloom.cli.output import Json, Verbose, give, say


def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method only, in full.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """List the delta methods; with a name, its formula, source and settings.

    Example: `deltaloom methods lora`
    """
    from deltaloom.jobs.methods import method_text, one_or_all

    found = one_or_all(name)
    say(method_text(found, full=name is not None))
    give({"methods": [fact.as_dict() for fact in found]}, as_json)
