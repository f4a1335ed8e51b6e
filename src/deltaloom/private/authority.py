"""The owner's side of identities: who was invited, enrolled, revoked; one file, shared by all of the owner's commands.

An invite is a short-lived certificate with its key and a role that may do one thing: ask for a party's certificate. So there
is no port and no method for strangers. It is good for one key pair: the same key may ask again (its answer may have been
lost), another one may not. Everything is read again when the file has changed, so that a revocation reaches a running server.
"""

from __future__ import annotations

import fcntl
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field

from deltaloom.errors import RefusedError, UsageError
from deltaloom.files import check_new
from deltaloom.private import identity
from deltaloom.private.identity import INVITE, OWNER, PARTY, Credential, Subject
from deltaloom.private.refused import Refused
from deltaloom.settings import Settings

DAY = 86400.0
FORMAT = 1


class Issued(Settings):
    """One certificate that the authority made."""

    name: str
    role: str
    key: str
    made: float
    expires: float
    revoked: float | None = None
    used_by: str | None = Field(None, description="of an invite: the key that enrolled with it")


class Register(Settings):
    """All certificates that an authority made, by serial number."""

    format: int = FORMAT
    owner: str
    issued: dict[str, Issued] = Field({})


class Invite(Settings):
    """What an invite file holds: where the owner is, how to know it, and the one-time credential."""

    format: int = FORMAT
    party: str
    owner: str
    address: str = Field(description="host:port")
    authority: str = Field(description="the owner's authority, PEM: who shows another one is not the owner")
    key: str
    certificate: str
    expires: float


class Authority:
    """An owner's authority in a folder; safe to use from several processes and threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._seen: tuple[int, int, int] | None = None
        self._register: Register | None = None
        self.credential = Credential(identity.read_secret(folder / "authority.key", "the owner's authority key"),
                                     _read(folder / "authority.crt"))
        self.register()

    @classmethod
    def create(cls, folder: Path, name: str) -> Authority:
        """Make keys, authority and an empty register in a new or empty folder.

        Raises:
            RefusedError: the folder holds something. SettingsError: an illegal name.
        """
        identity.check_name(name, "owner")
        check_new(folder)
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        made = identity.new_authority(name)
        identity.write_secret(folder / "authority.key", made.key)
        identity.write_secret(folder / "authority.crt", made.certificate)
        identity.write_secret(folder / "register.json", _dump(Register(owner=name)))
        return cls(folder)

    @property
    def name(self) -> str:
        """The owner's name."""
        return self.register().owner

    def register(self) -> Register:
        """What was issued so far, read again if another process changed it.

        Raises:
            UsageError: the register is missing or damaged.
        """
        path = self.folder / "register.json"
        with self._lock:
            try:
                facts = path.stat()
                if self._register is None or (facts.st_ino, facts.st_mtime_ns, facts.st_size) != self._seen:
                    record = json.loads(path.read_bytes())
                    self._register = Register.parse(record, "register.json")
                    self._seen = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
            except (OSError, ValueError) as error:
                raise UsageError("the owner's register cannot be read", got=str(error)[:200],
                                 hint="Restore it from a copy; without it no party can be recognised.") from None
            return self._register

    def server_credential(self, seconds: float = 90 * DAY) -> Credential:
        """A fresh key and certificate for the owner's server; made at each start, so it needs no rotation by hand."""
        made = identity.new_credential(self.credential, self.name, OWNER, seconds)
        self._note(made.certificate)
        return made

    def invite(self, party: str, address: str, seconds: float = 7 * DAY) -> Invite:
        """A one-time invite; the party's earlier invites that nobody used are revoked.

        Raises:
            SettingsError: an illegal name. RefusedError: that party was revoked.
        """
        identity.check_name(party)
        if any(one.name == party and one.role == PARTY and one.revoked for one in self.register().issued.values()):
            raise RefusedError("that party was revoked", got=party, hint="Invite it under another name.")
        made = identity.new_credential(self.credential, party, INVITE, seconds)
        expires = identity.subject_of(made.certificate).expires
        with self._change() as issued:
            for serial, one in issued.items():
                if one.name == party and one.role == INVITE and one.used_by is None and one.revoked is None:
                    issued[serial] = one.model_copy(update={"revoked": time.time()})
            self._add(issued, made.certificate)
        return Invite(party=party, owner=self.name, address=address, authority=self.credential.certificate.decode(),
                      key=made.key.decode(), certificate=made.certificate.decode(), expires=expires)

    def enrol(self, caller: Subject, request: bytes, seconds: float) -> bytes:
        """The certificate, PEM, for a party's signing request; `caller` was checked: an invite, or the party itself (renewal).

        Raises:
            Refused: the invite was used by another key. CheckpointError: no legal request.
        """
        key = identity.request_key(request)
        with self._change() as issued:
            own = issued[caller.serial]
            if caller.role == INVITE and own.used_by not in (None, key):
                raise Refused("used", "this invite was used already by another key", got=caller.name,
                              hint="If it was not you, tell the owner at once; ask for a new invite.")
            made = identity.issue(self.credential, request, caller.name, PARTY, seconds)
            if caller.role == INVITE:
                issued[caller.serial] = own.model_copy(update={"used_by": key})
            self._add(issued, made)
        return made

    def revoke(self, party: str) -> int:
        """Revoke all certificates and invites of a party; how many were good until now.

        Raises:
            UsageError: no such party.
        """
        with self._change() as issued:
            known = [serial for serial, one in issued.items() if one.name == party and one.role in (PARTY, INVITE)]
            if not known:
                raise UsageError("unknown party", got=party, legal=sorted(self.parties()))
            fresh = [serial for serial in known if issued[serial].revoked is None]
            for serial in fresh:
                issued[serial] = issued[serial].model_copy(update={"revoked": time.time()})
        return len(fresh)

    def parties(self) -> dict[str, list[Issued]]:
        """The certificates of each party, oldest first."""
        found: dict[str, list[Issued]] = {}
        for one in self.register().issued.values():
            if one.role == PARTY:
                found.setdefault(one.name, []).append(one)
        return found

    def check(self, certificate: bytes) -> Subject:
        """Who a certificate belongs to, if this owner made it and it is good now.

        Raises:
            Refused: unknown, revoked or expired.
        """
        subject = identity.subject_of(certificate)
        if not identity.issued_by(certificate, self.credential.certificate):
            raise Refused("unknown", "a certificate that this owner did not issue", got=subject.name)
        self.check_again(subject)
        return subject

    def check_again(self, subject: Subject) -> None:
        """Whether a subject that `check` accepted is still good: cheap enough for each request.

        Raises:
            Refused: revoked or expired meanwhile.
        """
        one = self.register().issued.get(subject.serial)
        if one is None or (one.name, one.role, one.key) != (subject.name, subject.role, subject.key):
            raise Refused("unknown", "a certificate that is not in the owner's register", got=subject.name)
        if one.revoked is not None:
            raise Refused("revoked", "this certificate was revoked", got=subject.name, hint="Ask the owner.")
        if time.time() > subject.expires:
            raise Refused("expired", "this certificate is expired", got=subject.name,
                          hint="Ask the owner for a new invite; renew in time.")

    @contextmanager
    def _change(self) -> Iterator[dict[str, Issued]]:
        with self._lock, (self.folder / "register.lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            register = self.register()
            issued = dict(register.issued)
            yield issued
            changed = Register(owner=register.owner, issued=issued)
            identity.write_secret(self.folder / "register.json", _dump(changed))

    def _note(self, certificate: bytes) -> None:
        with self._change() as issued:
            self._add(issued, certificate)

    @staticmethod
    def _add(issued: dict[str, Issued], certificate: bytes) -> None:
        subject = identity.subject_of(certificate)
        issued[subject.serial] = Issued(name=subject.name, role=subject.role, key=subject.key, made=time.time(),
                                        expires=subject.expires)


def _dump(register: Register) -> bytes:
    return json.dumps(register.as_dict(), indent=1).encode()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path.name} cannot be read: {error.strerror}", got=str(path),
                         hint="Is this an owner's folder? `deltaloom owner init` makes one.") from None
