"""What a model owner does: a folder with keys and policy, invites, revocation, and a look at what happened."""

from __future__ import annotations

import fcntl
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from deltaloom.errors import CheckpointError, RefusedError, UsageError
from deltaloom.files import atomic_folder
from deltaloom.private.audit import Audit, read_audit, verify
from deltaloom.private.authority import DAY, Authority
from deltaloom.private.identity import INVITE, check_name, write_secret
from deltaloom.private.policy import Policy, read_policy, write_policy
from deltaloom.private.usage import Usage

AUDIT, STATUS, POLICY, LOCK = "audit.jsonl", "status.json", "policy.yaml", "serving.lock"
ADDRESS = "127.0.0.1:7443"


def init(folder: Path, name: str, *, cut: int | None = None) -> dict[str, Any]:
    """Make an owner's folder: certificate authority, register and policy file; complete or absent.

    Raises:
        SettingsError: an illegal name. RefusedError: the folder holds something.
    """
    check_name(name, "owner")
    policy = Policy() if cut is None else Policy(cut=cut)
    with atomic_folder(folder) as temporary:
        Authority.create(temporary, name)
        write_policy(temporary / POLICY, policy)
        temporary.chmod(0o700)
    return {"owner": name, "folder": str(folder), "policy": str(folder / POLICY), "cut": policy.cut}


def authority_of(folder: Path) -> Authority:
    """The authority of an owner's folder.

    Raises:
        UsageError: it is none, or its key can be read by others.
    """
    if not (folder / "authority.key").exists():
        raise UsageError("this is no owner's folder", got=str(folder), hint="`deltaloom owner init DIR --name NAME` makes one.")
    return Authority(folder)


def invite(folder: Path, party: str, output: Path, *, address: str | None = None, days: float = 7.0) -> dict[str, Any]:
    """Write a one-time invite for a party; `address`: where it will find the owner (default: where the owner served last).

    Raises:
        RefusedError: the file exists, or that party was revoked. SettingsError: an illegal name. UsageError: no owner's folder.
    """
    authority = authority_of(folder)
    check_name(party)
    if output.exists():
        raise RefusedError("the file exists", got=str(output), hint="Choose another name.")
    if not output.absolute().parent.is_dir():
        raise UsageError("the folder for the invite does not exist", got=str(output.parent))
    where = address or _status(folder).get("address") or ADDRESS
    _check_address(where)
    made = authority.invite(party, where, days * DAY)
    write_secret(output, json.dumps(made.as_dict(), indent=1).encode())
    Audit(folder / AUDIT).write("owner", "invited", durable=True, party=party)
    return {"party": party, "path": str(output), "address": where, "expires": made.expires}


def revoke(folder: Path, party: str) -> dict[str, Any]:
    """Revoke a party's certificates and invites; a running server turns it away from its next request on.

    Raises:
        UsageError: no such party.
    """
    revoked = authority_of(folder).revoke(party)
    Audit(folder / AUDIT).write("owner", "revoked", durable=True, party=party, certificates=revoked)
    return {"party": party, "revoked": revoked}


def status(folder: Path) -> dict[str, Any]:
    """Who the parties are and what each used, whether the server runs, how far the rounds are; never content.

    Raises:
        UsageError: no owner's folder. CheckpointError: the audit log is broken.
    """
    authority, policy, last = authority_of(folder), read_policy(folder / POLICY), _status(folder)
    records = read_audit(folder / AUDIT) if (folder / AUDIT).exists() else []
    usage = Usage(records)
    certificates = authority.parties()
    invited = {one.name for one in authority.register().issued.values()
               if one.role == INVITE and one.used_by is None and one.revoked is None and one.expires > time.time()}
    parties = []
    for name in sorted({*certificates, *invited}):
        issued, used = certificates.get(name, []), usage.of(name)
        good = [one for one in issued if one.revoked is None]
        state = "invited" if not issued else "enrolled" if good else "revoked"
        expires = max((one.expires for one in good), default=None)
        parties.append({"party": name, "state": state, "expires": expires, "requests": used.requests, "tokens": used.tokens,
                        "bytes": used.bytes})
    published = [record["round"] for record in records if record["what"] == "round-published"]
    return {"owner": authority.name, "running": _serving(folder), "address": last.get("address"), "cut": policy.cut,
            "parties": parties, "rounds": published[-1] if published else 0, "in_flight": last.get("in_flight", 0),
            "refused": last.get("refused", {}), "audit_lines": len(records)}


def audit(folder: Path) -> dict[str, Any]:
    """Check the chain of the audit log from its first line to its last; what was done, how often.

    Raises:
        CheckpointError: a line was changed, removed or inserted; names the first such line.
    """
    authority_of(folder)
    if not (folder / AUDIT).exists():
        raise CheckpointError("there is no audit log yet", got=str(folder), hint="It begins with the first invite.")
    head = verify(folder / AUDIT)
    counts = Counter((str(record["who"]), str(record["what"])) for record in read_audit(folder / AUDIT))
    did = [{"who": who, "what": what, "times": times} for (who, what), times in sorted(counts.items())]
    return {"lines": head.lines, "hash": head.hash, "did": did}


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError("this is no address", got=address, legal="host:port, for example owner.example.org:7443")


def _status(folder: Path) -> dict[str, Any]:
    """What the server wrote last; empty if it never ran."""
    try:
        found = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _serving(folder: Path) -> bool:
    """Whether a server holds the folder's lock."""
    try:
        with (folder / LOCK).open("r") as held:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False
