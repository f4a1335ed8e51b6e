"""`deltaloom`: the commands, and what becomes of errors.

Nothing here or in the commands' files imports torch before a command needs it, so that --help answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback

import typer

from deltaloom import __version__
from deltaloom.cli import (
    chat,
    combine,
    compare,
    compress,
    convert,
    doctor,
    evaluate,
    init,
    inspect,
    leakage,
    merge,
    methods,
    models,
    owner,
    party,
    plan,
    predict,
    private_demo,
    report,
    search,
    subspace,
    tune,
)
from deltaloom.errors import DeltaloomError, RefusedError
from deltaloom.private.process import PASSIVE

TEAMWORK = "tune"  # the command that several processes do together

app = typer.Typer(name="deltaloom", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown",
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="Adapt a frozen pretrained model by training a small delta.")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"deltaloom {__version__}")
        raise typer.Exit


@app.callback()
def options(context: typer.Context, version: bool = typer.Option(False, "--version", callback=_version, is_eager=True,
                                         help="Print the version.")) -> None:
    """Adapt a frozen pretrained model by training a small delta."""
    if _processes() > 1 and context.invoked_subcommand not in (None, TEAMWORK):
        raise RefusedError("this command works in one process", got=f"{context.invoked_subcommand}, started {_processes()} times",
                           legal=TEAMWORK, hint="Start it without torchrun.")


app.command("tune")(tune.tune)
app.command("search")(search.search)
app.command("plan")(plan.plan)
app.command("eval")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("chat")(chat.chat)
app.command("inspect")(inspect.inspect)
app.command("merge")(merge.merge)
app.command("convert")(convert.convert)
app.command("combine")(combine.combine)
app.command("compress", context_settings=compress.CONTEXT)(compress.compress)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.add_typer(subspace.app, name="subspace")
app.command("methods")(methods.methods)
app.add_typer(models.app, name="models")
app.add_typer(owner.app, name="owner")
app.add_typer(party.app, name="party")
app.command("leakage")(leakage.leakage)
app.command("private-demo")(private_demo.private_demo)
app.command("doctor")(doctor.doctor)
app.command("init")(init.init)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits 0 done, 1 failed, 2 wrong usage or data, 3 out of memory or disk, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if _processes() > 1:  # whose threads must not spin while they wait; read when torch is loaded
        for name, value in PASSIVE.items():
            os.environ.setdefault(name, value)
    verbose = "-v" in arguments or "--verbose" in arguments
    try:
        app(args=arguments)
    except DeltaloomError as error:
        _fail(str(error), error.exit_code, verbose, quiet=error.known_to_all and _number() > 0)
    except MemoryError:
        _fail("out of memory. Use a smaller batch, shorter rows, or gradient checkpointing.", 3, verbose)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        _fail(f"{error.strerror or error}: {error.filename or ''}".rstrip(": ") + ".", 3 if full else 1, verbose)
    except KeyboardInterrupt:
        _fail("interrupted.", 130, verbose)
    except Exception as error:
        if "out of memory" in str(error).lower() or "can't allocate memory" in str(error).lower():
            _fail("out of memory. Use a smaller batch, shorter rows, or gradient checkpointing.", 3, verbose)
        _fail(f"{type(error).__name__}: {error}\nThis is a fault of deltaloom; run again with -v for the traceback.", 1, verbose)


def _processes() -> int:
    """How many processes torchrun has started for this run; 1 without it."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() else 1


def _number() -> int:
    number = os.environ.get("RANK", "0")
    return int(number) if number.isdigit() and _processes() > 1 else 0


def _fail(message: str, code: int, verbose: bool, quiet: bool = False) -> None:
    if verbose:
        traceback.print_exc()
    if quiet:
        raise SystemExit(code)
    where = f"process {_number()} of {_processes()}: " if _number() else ""
    sys.stderr.write(f"deltaloom: {where}{message}\n")
    problems = message.count("\n  - ")
    if problems > 1:
        sys.stderr.write(f"deltaloom: stopped: {problems} problems listed above.\n")
    raise SystemExit(code)
