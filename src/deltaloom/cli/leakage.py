"""`deltaloom leakage DIR --data F`: what the owner could recover of a party's text, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Json, Verbose, give, say


def leakage(
    folder: Annotated[Path, typer.Argument(help="A party's folder, after `party tune`.", metavar="DIR")],
    data: Annotated[list[Path], typer.Option("--data", help="Rows like the party's own: the first are attacked, the others are "
                                             "what the attacker learns from.")],
    rows: Annotated[int, typer.Option("--rows", min=2, help="Texts that are attacked.")] = 12,
    noise: Annotated[list[float] | None, typer.Option("--noise", help="A further case: Gaussian noise, in multiples of the size "
                                                      "of an activation. May be repeated; default: 1 and 4.")] = None,
    attacks: Annotated[list[str] | None, typer.Option("--attack", help="Only this attack on tokens; may be repeated. "
                                                         "Labels and membership are then left out.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Attack the party's own first results as the owner could, without guards, with the run's guards, and under noise.

    Then labels that stay home, from gradients, and whose rows were trained on, from a round's update: both in a rehearsal on the
    emulator. Each figure stands beside what a guess gets.

    Nothing is sent. Example: `deltaloom leakage a/ --data sample.jsonl`
    """
    from deltaloom.jobs.leakage import leakage as job

    give(job(folder, data, rows=rows, noise=noise if noise is not None else (1.0, 4.0), attacks=attacks or (), say=say), as_json)
