"""Shamir's secret sharing of 32 bytes over the field of integers modulo 2^521 - 1 (a prime).

The secret is the constant term of a polynomial of degree threshold - 1 whose other coefficients are random; a share is its
value at 1, 2, ... Any `threshold` shares give the secret by Lagrange interpolation at zero, fewer say nothing about it.
Shamir 1979.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from deltaloom.errors import DataError

PRIME = 2**521 - 1
SECRET_BYTES, SHARE_BYTES = 32, 66


def split(secret: bytes, threshold: int, points: int, randomness: bytes) -> list[bytes]:
    """Shares for the points 1 ... points; the coefficients follow from `randomness`, so that a restarted party repeats them."""
    stream = hashlib.shake_256(b"shamir" + randomness).digest(72 * (threshold - 1))  # 55 bits more than needed: no bias
    coefficients = [int.from_bytes(secret, "big")]
    coefficients += [int.from_bytes(stream[start:start + 72], "big") % PRIME for start in range(0, len(stream), 72)]
    shares = []
    for point in range(1, points + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * point + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret from shares by point; there must be at least as many as the threshold was.

    Raises:
        DataError: the shares do not belong together.
    """
    secret = 0
    for point, share in shares.items():
        over, under = 1, 1
        for other in shares:
            if other != point:
                over, under = over * other % PRIME, under * (other - point) % PRIME
        secret = (secret + int.from_bytes(share, "big") * over * pow(under, -1, PRIME)) % PRIME
    if secret >= 1 << (8 * SECRET_BYTES):
        raise DataError("the shares of a secret do not belong together", hint="Start the round again.")
    return secret.to_bytes(SECRET_BYTES, "big")
