"""The party's side of its identity: a folder with its key, its certificate, and how to know the owner.

The key is made here before anything is sent, and stays. Until the owner's answer is stored, `join` may be repeated with the same
invite: it asks again with the same key.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from deltaloom.errors import CheckpointError, RefusedError, UsageError
from deltaloom.private import identity
from deltaloom.private.authority import Invite
from deltaloom.private.identity import INVITE, PARTY, Credential, check_name
from deltaloom.settings import Settings

MOST_INVITE_BYTES = 65536


class Contact(Settings):
    """Whose party this is, and where the owner listens."""

    party: str
    owner: str
    address: str


def read_invite(path: Path) -> Invite:
    """The invite of a file.

    Raises:
        UsageError: it cannot be read, or others may read it. SettingsError: it is no invite. RefusedError: its time is over.
    """
    raw = identity.read_secret(path, "the invite")
    try:
        record = json.loads(raw[:MOST_INVITE_BYTES])
    except ValueError:
        raise UsageError("this file is no invite", got=str(path), hint="It comes from `deltaloom owner invite`.") from None
    invite = Invite.parse(record, path.name)
    check_name(invite.party)
    certificate = invite.certificate.encode()
    subject = identity.subject_of(certificate)
    if (subject.role, subject.name) != (INVITE, invite.party) or not identity.matches(invite.key.encode(), certificate):
        raise RefusedError("this invite contradicts itself", got=invite.party, hint="Ask the owner for a new one.")
    if time.time() > invite.expires:
        raise RefusedError("the time of this invite is over", got=invite.party, hint="Ask the owner for a new one.")
    return invite


@dataclass(frozen=True)
class Membership:
    """A party's identity folder."""

    folder: Path

    @classmethod
    def prepare(cls, folder: Path, invite: Invite) -> Membership:
        """Make a key for an invite; or take up an earlier, unfinished `join` of the same party and owner.

        Raises:
            RefusedError: the folder belongs to another party or owner.
        """
        contact = Contact(party=invite.party, owner=invite.owner, address=invite.address)
        made = cls(folder)
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        if (folder / "contact.json").exists():
            known = made.contact
            if (known.party, known.owner, made.authority) != (contact.party, contact.owner, invite.authority.encode()):
                raise RefusedError("this folder belongs to another party or owner", got=str(folder),
                                   hint="Choose another folder.")
            return made
        if not (folder / "party.key").exists():
            identity.write_secret(folder / "party.key", identity.new_key())
        identity.write_secret(folder / "authority.crt", invite.authority.encode())
        identity.write_secret(folder / "contact.json", json.dumps(contact.as_dict(), indent=1).encode())
        return made

    @property
    def contact(self) -> Contact:
        """Whose party this is, and where the owner listens."""
        return Contact.parse(json.loads(self._read("contact.json")), "contact.json")

    @property
    def authority(self) -> bytes:
        """The owner's authority, PEM."""
        return self._read("authority.crt")

    @property
    def enrolled(self) -> bool:
        """Whether the owner's certificate is here."""
        return (self.folder / "party.crt").exists()

    def request(self) -> bytes:
        """The signing request for this party's key, PEM."""
        return identity.signing_request(self._key(), self.contact.party)

    def accept(self, certificate: bytes) -> None:
        """Keep the certificate that the owner made.

        Raises:
            CheckpointError: it is not for this key, this party, or not from this owner.
        """
        subject = identity.subject_of(certificate)
        if (subject.name, subject.role) != (self.contact.party, PARTY) or not identity.matches(self._key(), certificate) \
                or not identity.issued_by(certificate, self.authority):
            raise CheckpointError("the owner sent a certificate that is not for this party's key", got=subject.name)
        identity.write_secret(self.folder / "party.crt", certificate)

    def credential(self) -> Credential:
        """The key and the certificate.

        Raises:
            UsageError: `join` was not finished. RefusedError: the certificate is expired.
        """
        if not self.enrolled:
            raise UsageError("this party has no certificate yet", got=str(self.folder), hint="Run `deltaloom party join` first.")
        certificate = self._read("party.crt")
        if time.time() > identity.subject_of(certificate).expires:
            raise RefusedError("this party's certificate is expired", got=self.contact.party,
                               hint="Ask the owner for a new invite.")
        return Credential(self._key(), certificate)

    def _key(self) -> bytes:
        return identity.read_secret(self.folder / "party.key", "the party's key")

    def _read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise UsageError(f"{name} cannot be read: {error.strerror}", got=str(self.folder),
                             hint="Is this a party's folder? `deltaloom party join` makes one.") from None
