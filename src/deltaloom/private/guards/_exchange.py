"""Key agreement and sealing between parties that meet only through the coordinator: X25519, HKDF, ChaCha20-Poly1305."""

from __future__ import annotations

import hashlib
from typing import Any

from deltaloom.errors import DataError, UsageError


def _library() -> Any:
    """The primitives of `cryptography`.

    Raises:
        UsageError: it is not installed.
    """
    try:
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import x25519
        from cryptography.hazmat.primitives.ciphers import aead
        from cryptography.hazmat.primitives.kdf import hkdf
    except ImportError:
        raise UsageError("masks need the library 'cryptography'", hint="pip install 'deltaloom[private]'") from None
    return hashes, serialization, x25519, aead, hkdf


def derive(secret: bytes, *labels: str | bytes) -> bytes:
    """32 bytes of a secret for one purpose; labels are told apart by their lengths."""
    parts = [label.encode() if isinstance(label, str) else label for label in labels]
    return hashlib.shake_256(secret + b"".join(len(part).to_bytes(4, "big") + part for part in parts)).digest(32)


def public_of(private: bytes) -> bytes:
    """The public half of an X25519 key."""
    _, serialization, x25519, _, _ = _library()
    key = x25519.X25519PrivateKey.from_private_bytes(private).public_key()
    return bytes(key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw))


def agree(private: bytes, public: bytes, info: bytes) -> bytes:
    """What two parties derive from one's private and the other's public key, for one purpose.

    Raises:
        DataError: the public key is a point that makes every secret the same.
    """
    hashes, _, x25519, _, hkdf = _library()
    try:
        shared = x25519.X25519PrivateKey.from_private_bytes(private).exchange(x25519.X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise DataError("a party's public key is not usable", hint="Start the round again without it.") from None
    return bytes(hkdf.HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(shared))


def seal(key: bytes, plain: bytes) -> bytes:
    """Encrypted and authenticated; a key seals ONE message ever, so the nonce is fixed."""
    _, _, _, aead, _ = _library()
    return bytes(aead.ChaCha20Poly1305(key).encrypt(bytes(12), plain, None))


def unseal(key: bytes, sealed: bytes) -> bytes:
    """The plain bytes.

    Raises:
        DataError: they were changed, or sealed with another key.
    """
    from cryptography.exceptions import InvalidTag
    _, _, _, aead, _ = _library()
    try:
        return bytes(aead.ChaCha20Poly1305(key).decrypt(bytes(12), sealed, None))
    except InvalidTag:
        raise DataError("what another party sealed was changed on the way", hint="Start the round again.") from None
