"""`deltaloom owner ...`: the model owner's side of private tuning."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from deltaloom.cli.output import Json, Verbose, give, say

app = typer.Typer(no_args_is_help=True, help="Private tuning, the model owner's side: keys, invites, the server, what happened.")
Folder = Annotated[Path, typer.Argument(help="The owner's folder.", metavar="DIR")]


@app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(help="The folder to make.", metavar="DIR")],
    name: Annotated[str, typer.Option("--name", help="The owner's name: a-z, 0-9 and inner hyphens.")],
    cut: Annotated[int | None, typer.Option("--cut", min=1, help="Blocks in the parties' front, for the policy file.")] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make an owner's folder: certificate authority, register, policy file.

    Example: `deltaloom owner init owner/ --name acme`
    """
    from deltaloom.jobs.owner import init as job

    found = job(folder, name, cut=cut)
    say(f"Made {folder} for {name}. What parties may do stands in {found['policy']}.")
    give(found, as_json)


@app.command("invite")
def invite(
    folder: Folder,
    party: Annotated[str, typer.Option("--party", help="The party's name: a-z, 0-9 and inner hyphens.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The invite file to write; it is a secret.")],
    address: Annotated[str | None, typer.Option("--address", help="host:port where the party will find the owner; default: where "
                                                "it served last, else 127.0.0.1:7443.")] = None,
    days: Annotated[float, typer.Option("--days", min=0.001, help="How long the invite is good.")] = 7.0,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a one-time invite, with which a party gets its certificate.

    Example: `deltaloom owner invite owner/ --party hospital-a -o a.invite`
    """
    from deltaloom.jobs.owner import invite as job

    found = job(folder, party, output, address=address, days=days)
    say(f"Wrote {output} for {party}, good for {days:g} days and one key. Send it over a way that others cannot read.")
    give(found, as_json)


@app.command("revoke")
def revoke(
    folder: Folder,
    party: Annotated[str, typer.Option("--party", help="The party's name.")],
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Revoke a party's certificates and invites, at once, also for a running server.

    Example: `deltaloom owner revoke owner/ --party hospital-a`
    """
    from deltaloom.jobs.owner import revoke as job

    found = job(folder, party)
    say(f"Revoked {found['revoked']} certificates and invites of {party}.")
    give(found, as_json)


@app.command("serve")
def serve(
    folder: Folder,
    model: Annotated[str, typer.Option("--model", help="The model whose back is served.")],
    cut: Annotated[int | None, typer.Option("--cut", min=1, help="Blocks in the parties' front; default: as the policy says.")
                   ] = None,
    listen: Annotated[str, typer.Option("--listen", help="host:port; port 0 takes a free one.")] = "127.0.0.1:7443",
    task: Annotated[str | None, typer.Option("--task", help="What the model is for; default: as its head says.")] = None,
    labels: Annotated[str, typer.Option("--labels", help="Names of the classes of a new head, with commas.")] = "",
    head: Annotated[str | None, typer.Option("--head", help="Who holds the head: owner or party; a new one: the party.")
                    ] = None,
    precision: Annotated[str, typer.Option("--precision", help="fp32 or bf16; parties compute in the same.")] = "fp32",
    rounds: Annotated[int, typer.Option("--rounds", min=0, help="Joint rounds; 0: each party tunes alone.")] = 0,
    parties: Annotated[int, typer.Option("--parties-per-round", min=1, help="The first round begins with so many parties.")] = 2,
    quorum: Annotated[int | None, typer.Option("--quorum", min=1, help="A round may close at its deadline with so many.")] = None,
    deadline: Annotated[float, typer.Option("--deadline", help="Seconds that a round waits for all.")] = 3600.0,
    deltas: Annotated[Path | None, typer.Option("--deltas", help="With rounds: a file with the parties' `deltas`, for instance "
                                                "their run file.")] = None,
    norm_bound: Annotated[float | None, typer.Option("--norm-bound", help="The longest change that a party may make in a round."
                                                     )] = None,
    mean: Annotated[str, typer.Option("--mean", help="How updates are joined: weighted, even, median or trimmed.")] = "weighted",
    update_guard: Annotated[str | None, typer.Option("--update-guard", help="What hides single updates from the owner.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the rounds' initial values.")] = 0,
    fresh_rounds: Annotated[bool, typer.Option("--fresh-rounds", help="Forget the rounds of an earlier run.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Serve the back of a model to parties, over mutual TLS; a restarted server goes on where it was.

    Example: `deltaloom owner serve owner/ --model bundled:smollm2-135m-instruct --cut 2 --listen 127.0.0.1:7443`
    """
    from deltaloom.errors import UsageError
    from deltaloom.jobs.serve import Rounds, Served
    from deltaloom.jobs.serve import serve as job

    if head not in (None, "owner", "party"):
        raise UsageError("--head", got=head, legal="owner or party")
    if rounds and deltas is None:
        raise UsageError("joint rounds need the deltas that all parties tune", hint="Name a file with them: --deltas RUN.yaml")
    joint = None if not rounds or deltas is None else Rounds(
        rounds=rounds, parties=parties, quorum=quorum, deadline=deadline, norm_bound=norm_bound, mean=mean,
        update_guard=update_guard, deltas=deltas, seed=seed)
    names = tuple(name.strip() for name in labels.split(",") if name.strip())
    served = Served(model, task, names, head, cut, precision)  # type: ignore[arg-type]
    give(job(folder, served, listen=listen, rounds=joint, fresh_rounds=fresh_rounds, say=say), as_json)


@app.command("status")
def status(folder: Folder, as_json: Json = False, verbose: Verbose = False) -> None:
    """Who the parties are, what each used, how far the rounds are; never content.

    Example: `deltaloom owner status owner/`
    """
    from deltaloom.jobs.owner import status as job
    from deltaloom.report.text import byte_size, table_text

    found = job(folder)
    say(f"{found['owner']}: " + (f"serving at {found['address']}" if found["running"] else "not serving")
        + f", cut {found['cut']}, rounds published: {found['rounds']}, audit lines: {found['audit_lines']}")
    rows = [(one["party"], one["state"], "" if one["expires"] is None else time.strftime("%Y-%m-%d", time.gmtime(one["expires"])),
             one["requests"], one["tokens"], byte_size(one["bytes"])) for one in found["parties"]]
    if rows:
        say(table_text(("party", "state", "until", "requests", "tokens", "bytes"), rows))
    give(found, as_json)


@app.command("audit")
def audit(folder: Folder, as_json: Json = False, verbose: Verbose = False) -> None:
    """Check the chain of the audit log, and say who did what how often.

    Example: `deltaloom owner audit owner/`
    """
    from deltaloom.jobs.owner import audit as job
    from deltaloom.report.text import table_text

    found = job(folder)
    say(table_text(("who", "what", "times"), [(one["who"], one["what"], one["times"]) for one in found["did"]]))
    say(f"The chain is whole: {found['lines']} lines, head {found['hash'][:16]}...")
    give(found, as_json)
