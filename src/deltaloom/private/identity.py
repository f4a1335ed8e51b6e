"""Names, keys and certificates of private tuning: an owner's own authority, and the identities it vouches for.

Keys are on the curve P-256, because TLS libraries accept it everywhere. A certificate says who (common name) and in what role
(organisational unit); roles are told apart by it and by the extended key usage, so that a party's certificate can never pass
for the owner's server. A private key is made where it is used and leaves the machine never: a party sends a signing request.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from pathlib import Path

from deltaloom.errors import CheckpointError, SettingsError, UsageError
from deltaloom.files import sync, write_atomic

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError:
    raise UsageError("private tuning needs the package 'cryptography'", hint="pip install 'deltaloom[private]'") from None

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
SERVER_NAME = "owner.deltaloom"   # what the server's certificate is for: the authority is private, so addresses may change freely
AUTHORITY, OWNER, PARTY, INVITE = "authority", "owner", "party", "invite"
USAGES = {OWNER: ExtendedKeyUsageOID.SERVER_AUTH, PARTY: ExtendedKeyUsageOID.CLIENT_AUTH, INVITE: ExtendedKeyUsageOID.CLIENT_AUTH}
SKEW = datetime.timedelta(days=1)  # certificates are valid a little before they were made: clocks of machines disagree
MOST_PEM_BYTES = 16384             # of one certificate or request from outside


@dataclass(frozen=True)
class Credential:
    """A private key and the certificate for it, both PEM."""

    key: bytes
    certificate: bytes


@dataclass(frozen=True)
class Subject:
    """What a certificate says: who, in what role, `serial` (hexadecimal), for which `key` (its SHA-256), until when."""

    name: str
    role: str
    serial: str
    key: str
    expires: float


def check_name(name: str, what: str = "party") -> str:
    """The name itself.

    Raises:
        SettingsError: not 1 to 63 lower-case letters, digits and inner hyphens.
    """
    if not NAME.fullmatch(name):
        raise SettingsError(f"illegal name of the {what}", got=name[:80], legal="1 to 63 of a-z, 0-9 and inner hyphens")
    return name


def write_secret(path: Path, content: bytes) -> Path:
    """Write a file that only its owner can read (0600), complete or not at all, and durable."""
    write_atomic(path, content, mode=0o600)
    sync(path.parent)
    return path


def read_secret(path: Path, what: str) -> bytes:
    """The bytes of a secret file.

    Raises:
        UsageError: it is missing, or others may read it.
    """
    try:
        mode = path.stat().st_mode & 0o777
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{what} cannot be read: {error.strerror}", got=str(path)) from None
    if mode & 0o077:
        raise UsageError(f"others on this machine may read {what}", got=f"mode {mode:o}", legal="0600",
                         hint=f"chmod 600 {path}, and revoke it if somebody may have read it.")
    return content


def new_key() -> bytes:
    """A new private key, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def new_authority(name: str, days: int = 3650) -> Credential:
    """A new certificate authority of an owner, which vouches for its own key."""
    pem = new_key()
    key = _private(pem)
    subject = _subject(name, AUTHORITY)
    builder = _builder(subject, subject, key.public_key(), days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(authority=True), critical=True)
    return Credential(pem, _pem(builder.sign(key, hashes.SHA256())))


def signing_request(key: bytes, name: str) -> bytes:
    """The request, PEM, by which the holder of `key` asks for a certificate; it proves possession of the key."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(name, PARTY))
    return builder.sign(_private(key), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def issue(authority: Credential, request: bytes, name: str, role: str, seconds: float) -> bytes:
    """A certificate, PEM, for the key of a signing request; name and role are the authority's decision, not the request's.

    Raises:
        CheckpointError: no legal request, a key of another kind, or a signature that is not the key's.
    """
    wanted = _request(request)
    public = wanted.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name != "secp256r1":
        raise CheckpointError("a signing request has a key of another kind", legal="a key on the curve P-256")
    signer = _certificate(authority.certificate)
    builder = _builder(_subject(name, role), signer.subject, public, seconds / 86400)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(authority=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([USAGES[role]]), critical=True)
    if role == OWNER:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
    return _pem(builder.sign(_private(authority.key), hashes.SHA256()))


def new_credential(authority: Credential, name: str, role: str, seconds: float) -> Credential:
    """A new key and its certificate at once: for the owner's own server, and for invites."""
    key = new_key()
    return Credential(key, issue(authority, signing_request(key, name), name, role, seconds))


def request_key(request: bytes) -> str:
    """The SHA-256 of the public key that a signing request is for."""
    return _fingerprint(_request(request).public_key())


def subject_of(certificate: bytes) -> Subject:
    """What a certificate says, unverified.

    Raises:
        CheckpointError: these bytes are no certificate.
    """
    found = _certificate(certificate)
    return Subject(_attribute(found.subject, NameOID.COMMON_NAME), _attribute(found.subject, NameOID.ORGANIZATIONAL_UNIT_NAME),
                   f"{found.serial_number:x}", _fingerprint(found.public_key()), found.not_valid_after_utc.timestamp())


def issued_by(certificate: bytes, authority: bytes) -> bool:
    """Whether an authority, given by its certificate, signed this one."""
    try:
        _certificate(certificate).verify_directly_issued_by(_certificate(authority))
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def matches(key: bytes, certificate: bytes) -> bool:
    """Whether a certificate is for this private key."""
    return _fingerprint(_private(key).public_key()) == _fingerprint(_certificate(certificate).public_key())


def _builder(subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: float) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - SKEW)
    return builder.not_valid_after(now + datetime.timedelta(days=days))


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, content_commitment=False,
                         key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
                         decipher_only=False)


def _subject(name: str, role: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role)])


def _attribute(name: x509.Name, which: x509.ObjectIdentifier) -> str:
    values = name.get_attributes_for_oid(which)
    if len(values) != 1:
        raise CheckpointError("a certificate does not say once who it is for and in what role")
    return str(values[0].value)


def _private(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        raise CheckpointError("a key file does not hold a private key", hint="Restore it from a copy, or enrol again.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CheckpointError("a key file holds a key of another kind", legal="a key on the curve P-256")
    return key


def _request(pem: bytes) -> x509.CertificateSigningRequest:
    try:
        if len(pem) > MOST_PEM_BYTES:
            raise ValueError
        request = x509.load_pem_x509_csr(pem)
        whole = request.is_signature_valid
    except Exception:  # the parser raises several kinds; all of them mean the same to the sender
        whole = False
    if not whole:
        raise CheckpointError("this is no signing request that its own key has signed")
    return request


def _certificate(pem: bytes) -> x509.Certificate:
    try:
        if len(pem) > MOST_PEM_BYTES:
            raise ValueError
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise CheckpointError("these bytes are no certificate") from None


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _fingerprint(public: CertificatePublicKeyTypes) -> str:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize().hex()
