"""`deltaloom party ...`: a data owner's side of private tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Json, Overrides, Verbose, give, say

app = typer.Typer(no_args_is_help=True, help="Private tuning, a data owner's side: join, tune, predict; the data stays here.")
Folder = Annotated[Path, typer.Argument(help="The party's folder.", metavar="DIR")]
RunFile = Annotated[Path, typer.Argument(help="The run file; its model is the emulator that the owner gave.", metavar="RUN.yaml")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin anew; replace what an earlier run left.")]
Personal = Annotated[bool | None, typer.Option("--personal/--common", help="Which delta; default: the personal one if there is.")]


@app.command("join")
def join(
    invite: Annotated[Path, typer.Argument(help="The invite that the owner sent.", metavar="INVITE")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The party's folder to make.")],
    patience: Annotated[float, typer.Option("--patience", min=0.1, help="Seconds to wait for the owner.")] = 60.0,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make a key pair here, and get its certificate from the owner's running server.

    Example: `deltaloom party join a.invite -o a/`
    """
    from deltaloom.jobs.party import join as job

    found = job(invite, output, patience=patience, say=say)
    say(f"{output} is {found['party']} of {found['owner']}. The invite is used up; the key in the folder stays here.")
    give(found, as_json)


@app.command("renew")
def renew(folder: Folder, as_json: Json = False, verbose: Verbose = False) -> None:
    """Get a new certificate for the same key, before the old one expires.

    Example: `deltaloom party renew a/`
    """
    from deltaloom.jobs.party import renew as job

    found = job(folder)
    say(f"{found['party']} has a new certificate.")
    give(found, as_json)


@app.command("emulate")
def emulate(folder: Folder, run_file: RunFile, overrides: Overrides = None, overwrite: Overwrite = False, as_json: Json = False,
            verbose: Verbose = False) -> None:
    """Tune on the emulator, here; nothing is sent. Run again after an interruption, it goes on.

    Example: `deltaloom party emulate a/ run.yaml`
    """
    from deltaloom.jobs.party_tune import emulate as job
    from deltaloom.jobs.runfile import read_run_file

    give(job(folder, read_run_file(run_file, overrides), overwrite=overwrite, say=say), as_json)


@app.command("tune")
def tune(
    folder: Folder,
    run_file: RunFile,
    overrides: Overrides = None,
    personal: Annotated[bool, typer.Option("--personal", help="Own deltas behind the common ones, which stay as they are."
                                           )] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Tune with the owner's model over the cut, in joint rounds if the owner holds any; run again, it goes on.

    Example: `deltaloom party tune a/ run.yaml`
    """
    from deltaloom.jobs.party_tune import tune as job
    from deltaloom.jobs.runfile import read_run_file

    give(job(folder, read_run_file(run_file, overrides), personal=personal, overwrite=overwrite, say=say), as_json)


@app.command("predict")
def predict(
    folder: Folder,
    data: Annotated[list[Path], typer.Option("--data", help="The file with rows; targets are not needed.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write one JSON line per row; default: "
                                                "predictions.jsonl in the party's folder.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length limit of generated text.")] = 128,
    personal: Personal = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Predict for every row of a file, with the front here and the back at the owner.

    Example: `deltaloom party predict a/ --data new.jsonl -o out.jsonl`
    """
    from deltaloom.jobs.party_use import predict as job

    give(job(folder, data, output or folder / "predictions.jsonl", max_new_tokens=max_new_tokens, overwrite=overwrite,
             personal=personal, say=say), as_json)


@app.command("chat")
def chat(
    folder: Folder,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest word each time.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length limit of an answer.")] = 256,
    seed: Annotated[int, typer.Option("--seed", help="Decides the answers when the temperature is above 0.")] = 0,
    personal: Personal = None,
    verbose: Verbose = False,
) -> None:
    """Talk to the tuned model; the front runs here, the back at the owner; /base switches the delta off and on.

    Example: `deltaloom party chat a/`
    """
    from deltaloom.jobs.party_use import chat as job

    job(folder, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, personal=personal)
