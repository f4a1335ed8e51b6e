"""What each party has used altogether; begun from the audit log, so that a restart forgets nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from deltaloom.private.policy import Quotas
from deltaloom.private.refused import Refused

MEGABYTE = 1_000_000


@dataclass
class Used:
    """Of one party."""

    requests: int = 0
    tokens: int = 0
    bytes: int = 0


class Usage:
    """Totals by party; safe to use from several threads."""

    def __init__(self, records: Iterable[Mapping[str, object]] = ()) -> None:
        self._lock = threading.Lock()
        self._used: dict[str, Used] = {}
        for record in records:
            if "up" in record:
                self.add(str(record["who"]), *(_whole(record.get(name)) for name in ("tokens", "up", "down")))

    def add(self, party: str, tokens: int, up: int, down: int) -> None:
        """Count one answered request."""
        with self._lock:
            used = self._used.setdefault(party, Used())
            used.requests += 1
            used.tokens += tokens
            used.bytes += up + down

    def of(self, party: str) -> Used:
        """What a party has used."""
        with self._lock:
            used = self._used.get(party, Used())
            return Used(used.requests, used.tokens, used.bytes)

    def check(self, party: str, quotas: Quotas, *, tokens: int, up: int) -> None:
        """Whether a party may make a further request.

        Raises:
            Refused: a quota would be exceeded.
        """
        used = self.of(party)
        megabytes = None if quotas.megabytes is None else quotas.megabytes * MEGABYTE
        for what, after, limit in (("requests", used.requests + 1, quotas.requests),
                                   ("tokens", used.tokens + tokens, quotas.tokens), ("bytes", used.bytes + up, megabytes)):
            if limit is not None and after > limit:
                raise Refused("quota", f"this party's quota of {what} is used up", got=after, legal=f"up to {limit}",
                              hint="Ask the owner.")


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0
