"""`deltaloom methods [NAME]`: the methods, presets and compressors, and their settings."""

from __future__ import annotations

from typing import Annotated

import typer

from deltaloom.cli.output import Json, Verbose, give, say


def methods(
    name: Annotated[str | None, typer.Argument(help="Show this method only, in full.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """List the delta methods, the presets and the compressors; with a name, its formula, source and settings.

    Example: `deltaloom methods lora`
    """
    from deltaloom.jobs.methods import compressors, method_text, one_or_all, presets

    found = one_or_all(name)
    say(method_text(found, full=name is not None))
    others = compressors() if name is None else []
    combined = presets() if name is None else []
    if others:
        say("\nPresets, as {preset: NAME}:\n" + method_text(combined, full=False))
        say("\nFor deltaloom compress:\n" + method_text(others, full=False))
    give({"methods": [fact.as_dict() for fact in found], "presets": [fact.as_dict() for fact in combined],
          "compressors": [fact.as_dict() for fact in others]}, as_json)
