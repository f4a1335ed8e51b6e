"""`Refused`: what was turned away at the wire, with a reason that operators can count."""

from __future__ import annotations

from deltaloom.errors import DeltaloomError

# The reasons, and what each means; metrics count by them.
REASONS = {
    "magic": "the bytes do not begin as a frame does",
    "version": "a frame of another version of the protocol",
    "truncated": "a frame ended before its bytes did",
    "oversized": "a frame, header or chunk is larger than allowed",
    "checksum": "the bytes are not those that were sent",
    "header": "the header is not legal msgpack, or not a map",
    "schema": "a field is missing, unknown or of the wrong kind",
    "shape": "a shape, length or offset does not fit",
    "dtype": "a codec or type that is not allowed here",
    "non-finite": "a tensor holds NaN or infinity",
    "party": "a frame speaks for somebody else",
    "conflict": "a repeat of a request with other bytes",
    "late": "a request for a step that is over",
    "order": "a request that cannot come now",
    "policy": "the owner's policy does not allow it",
    "quota": "a quota is used up",
    "unknown": "a certificate that this owner does not know",
    "revoked": "a certificate or party that was revoked",
    "expired": "a certificate or invite whose time is over",
    "used": "an invite that was used",
    "busy": "no more sessions or parties at once",
    "superseded": "the party opened a newer stream for the same",
    "stopping": "the owner is shutting down; try again",
    "forgotten": "the owner no longer has what the request names; send it whole",
    "refused": "what was asked for cannot be done",
    "resources": "the owner lacks disk space or memory; try again",
    "deadline": "the owner took longer than it may",
    "failed": "the owner could not compute it",
}
AGAIN = frozenset({"busy", "stopping", "superseded", "resources", "truncated", "checksum"})  # the same request may succeed later


class Refused(DeltaloomError):
    """A frame, request or caller that was turned away; `reason` is one of REASONS."""

    def __init__(self, reason: str, what: str, *, got: object = None, legal: object = None, hint: str | None = None) -> None:
        super().__init__(what, got=got, legal=legal, hint=hint)
        self.reason = reason

    @property
    def again(self) -> bool:
        """Whether the same request may succeed later."""
        return self.reason in AGAIN
