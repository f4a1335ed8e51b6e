"""`deltaloom`: the commands, and what becomes of errors.

Nothing here or in the commands' files imports torch before a command needs it, so that --help answers at once.
"""

from __future__ import annotations

import errno
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
from deltaloom.errors import DeltaloomError

app = typer.Typer(name="deltaloom", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown",
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="Adapt a frozen pretrained model by training a small delta.")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"deltaloom {__version__}")
        raise typer.Exit


@app.callback()
def options(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True,
                                         help="Print the version.")) -> None:
    """Adapt a frozen pretrained model by training a small delta."""


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
    verbose = "-v" in arguments or "--verbose" in arguments
    try:
        app(args=arguments)
    except DeltaloomError as error:
        _fail(str(error), error.exit_code, verbose)
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


def _fail(message: str, code: int, verbose: bool) -> None:
    if verbose:
        traceback.print_exc()
    sys.stderr.write(f"deltaloom: {message}\n")
    problems = message.count("\n  - ")
    if problems > 1:
        sys.stderr.write(f"deltaloom: stopped: {problems} problems listed above.\n")
    raise SystemExit(code)
