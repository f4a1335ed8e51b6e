"""`deltaloom chat RUN_OR_MODEL`: talk to a model in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Verbose


def chat(
    source: Annotated[str, typer.Argument(help="A run folder, a delta folder or a model.", metavar="RUN_OR_MODEL")],
    delta: Annotated[list[Path] | None, typer.Option("--delta", help="A delta to put on the model; several compose in order.")
                     ] = None,
    weights: Annotated[str | None, typer.Option("--weights", help="Several deltas' weighted sum instead, e.g. 0.5,0.5.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest word each time.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length limit of an answer.")] = 256,
    seed: Annotated[int, typer.Option("--seed", help="Decides the answers when the temperature is above 0.")] = 0,
    verbose: Verbose = False,
) -> None:
    """Talk to a model, with its delta, in the terminal; /base switches the delta off and on, an empty line ends.

    Example: `deltaloom chat runs/assistant`
    """
    from deltaloom.jobs.chat import chat as job

    job(source, deltas=delta or [], weights=weights, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
