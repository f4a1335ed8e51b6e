"""What a party does to belong to an owner: join, and connect. Its folder holds everything it has:

    party.key party.crt authority.crt contact.json    who it is, see `private.membership`; the key never leaves
    state/          names of its runs, noise key, what it answered in rounds, what it released through guards
    emulated/       run folder of tuning on the emulator
    front/          its half of the model
    tuned/          run folder of split tuning
    personal/       run folder of a personal delta on top of the common one
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaloom import __version__
from deltaloom.deltas.base import Method
from deltaloom.errors import CheckpointError, SettingsError, UsageError
from deltaloom.events import finite
from deltaloom.private import client
from deltaloom.private.account import Account, unpromised
from deltaloom.private.client import GrpcChannel, OwnerAway, Reconnect
from deltaloom.private.guards.base import CROSSINGS, Chain, Guard
from deltaloom.private.identity import read_secret, write_secret
from deltaloom.private.membership import Membership, read_invite
from deltaloom.private.messages import Guard as LayerGuard
from deltaloom.private.settings import PrivateSettings
from deltaloom.private.wire.convert import Hello

STATE, EMULATED, FRONT, TUNED, PERSONAL = "state", "emulated", "front", "tuned", "personal"
ARRIVE_SECONDS = 15.0   # an owner that is being restarted is waited for so long before a command begins
KEY_BYTES = 32
RELEASED = "released.jsonl"
Say = Callable[[str], None]


def join(invite_file: Path, folder: Path, *, patience: float = 60.0, say: Say = print) -> dict[str, Any]:
    """Make a key pair here and get a certificate for it from the owner; may be repeated until it succeeds.

    Raises:
        UsageError, SettingsError, RefusedError: the invite is none, or its time is over. Refused: the owner says no.
        OwnerAway: it cannot be reached.
    """
    invite = read_invite(invite_file)
    membership = Membership.prepare(folder, invite)
    if membership.enrolled:
        say(f"{folder} has joined already.")
    else:
        say(f"Joining {invite.owner} at {invite.address} as {invite.party}")
        client.join(membership, invite.key.encode(), invite.certificate.encode(), patience=patience)
    return {"party": invite.party, "owner": invite.owner, "address": invite.address, "folder": str(folder)}


def renew(folder: Path, *, patience: float = 60.0) -> dict[str, Any]:
    """A new certificate for the same key, while the old one is good.

    Raises:
        Refused, OwnerAway: as `join`.
    """
    membership = Membership(folder)
    own = membership.credential()
    client.join(membership, own.key, own.certificate, patience=patience)
    return {"party": membership.contact.party, "folder": str(folder)}


@dataclass(frozen=True)
class PartyState:
    """The party's own notes in `state/`."""

    folder: Path

    @property
    def noise_key(self) -> bytes:
        """The party's secret for noise and masks, made when it is first needed."""
        path = self.folder / "secret.key"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            write_secret(path, secrets.token_hex(KEY_BYTES).encode())
        return bytes.fromhex(read_secret(path, "the party's secret").decode())

    def run_name(self, which: str, *, fresh: bool = False) -> str:
        """The name of a run, unlike any other and the same until a fresh one is begun."""
        if not fresh and (found := self.read(which).get("run")):
            return str(found)
        name = secrets.token_hex(16)
        self.write(which, {"run": name})
        return name

    def read(self, which: str) -> dict[str, Any]:
        """The notes of a run; empty if there are none.

        Raises:
            CheckpointError: they cannot be read.
        """
        path = self.folder / f"{which}.json"
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise CheckpointError("the party's notes of its run cannot be read", got=str(path),
                                  hint="Begin the run anew with --overwrite.")
        return found

    def write(self, which: str, notes: dict[str, Any]) -> None:
        """Replace the notes of a run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        write_secret(self.folder / f"{which}.json", json.dumps(notes).encode())


def member(folder: Path) -> Membership:
    """The membership of a party's folder, with a certificate that is good now.

    Raises:
        UsageError: it has not joined. RefusedError: the certificate is expired.
    """
    if not (folder / "contact.json").exists():
        raise UsageError("this is no party's folder", got=str(folder), hint="`deltaloom party join INVITE -o DIR` makes one.")
    found = Membership(folder)
    found.credential()
    return found


@dataclass(frozen=True)
class Guarding:
    """What a run's guards are and what they are worth: `layers` for what leaves; `account` None where no guard draws noise."""

    settings: PrivateSettings
    layers: tuple[LayerGuard, ...] = ()
    account: Account | None = None

    def privacy(self, *, rounds: bool = False) -> dict[str, Any]:
        """What was promised of what has left so far, and what was not: the fields of `events.Privacy`; `rounds`: joint ones."""
        settings, account = self.settings, self.account
        rows = account.rows(settings.dp_delta) if account is not None else []
        open_ways = unpromised(account.costs if account is not None else {}, labels=settings.labels, rounds=rounds,
                               masked=settings.update_guard is not None)
        if account is not None and account.cut_lines:
            open_ways.append(f"what {account.cut_lines} cut lines in the journal of releases stand for: a kill cut them before "
                             "anything was sent, or the file was damaged")
        return dict(finite({"promised": account is not None, "delta": settings.dp_delta, "rows": rows, "unpromised": open_ways}))


def guards_of(settings: PrivateSettings, state: PartyState, run: str) -> Guarding:
    """The run's guards as one chain, and around it the account of what they released; `run` names this run or session."""
    if not settings.guards:
        return Guarding(settings)
    chain = Chain(settings.row_guards(), state.noise_key)
    if not any(chain.cost(crossing).promised for crossing in CROSSINGS):
        return Guarding(settings, (chain,))
    account = Account(state.folder / RELEASED, chain, state.noise_key, run)
    return Guarding(settings, (chain, account), account)


def connect(membership: Membership, settings: PrivateSettings, *, run: str, purpose: str, methods: Sequence[Method],
            fingerprint: str = "") -> GrpcChannel:
    """A stream to the owner, welcomed.

    Raises:
        OwnerAway: it cannot be reached. Refused: it does not let this party in, with the reason.
    """
    _arrive(membership.contact.address)
    names = [guard.name for guard in settings.row_guards()]
    method = "_".join(sorted({method.name for method in methods}))[:64]
    hello = Hello(run, purpose, __version__, settings.codec, settings.cut, method, names, settings.labels, fingerprint)
    channel = GrpcChannel(membership, hello, Reconnect(patience=settings.patience))
    try:
        _ = channel.welcome
    except BaseException:
        channel.close()
        raise
    return channel


def _arrive(address: str) -> None:
    """That somebody listens there; an owner that is just starting is waited for."""
    host, _, port = address.rpartition(":")
    until = time.monotonic() + ARRIVE_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, ValueError) as error:
            if time.monotonic() > until or isinstance(error, ValueError):
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                raise OwnerAway("the owner cannot be reached", got=f"{address}: {reason}",
                                hint="Is `deltaloom owner serve` running there? Then run the same command again.") from None
        time.sleep(0.3)


def own_methods(settings: PrivateSettings, methods: Sequence[Method],
                parse: Callable[[Sequence[dict[str, Any]], str], tuple[Method, ...]]) -> tuple[Method, ...]:
    """The methods of a personal delta."""
    if not settings.personal:
        return tuple(methods)
    if any("from" in entry for entry in settings.personal):
        raise SettingsError("private.personal lists methods", got=settings.personal, legal="[{method: NAME, ...}]")
    return parse(settings.personal, "private.personal")


def guard_names(guards: Sequence[Guard]) -> str:
    """For people."""
    return ", ".join(guard.name for guard in guards) or "none"
