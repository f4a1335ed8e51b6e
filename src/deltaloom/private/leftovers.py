"""Decoding sessions whose process is gone: given back when another run of the same party wants to open one.

A party that was killed cannot close its sessions; started again, it would find no room until they are forgotten for lack of use.
A run whose connection only broke may lose its sessions so as well: it sends all its hidden states again when it returns.
"""

from __future__ import annotations

import threading
from collections import Counter

MOST = 256  # names kept for each run: far more than a party may have open


class Leftovers:
    """Which run of which party opened which sessions, and which runs have a stream; may be called from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: Counter[tuple[str, str]] = Counter()
        self._sessions: dict[tuple[str, str], dict[str, None]] = {}  # in the order in which they were opened

    def came(self, party: str, run: str) -> None:
        """A stream of this run has begun."""
        with self._lock:
            self._streams[party, run] += 1

    def went(self, party: str, run: str) -> None:
        """It has ended."""
        with self._lock:
            self._streams[party, run] -= 1
            if self._streams[party, run] <= 0:
                del self._streams[party, run]

    def opened(self, party: str, run: str, session: str) -> None:
        """The run asks for this session."""
        with self._lock:
            names = self._sessions.setdefault((party, run), {})
            names[session] = None
            while len(names) > MOST:
                del names[next(iter(names))]

    def closed(self, party: str, run: str, session: str) -> None:
        """The run gives this session back."""
        with self._lock:
            names = self._sessions.get((party, run), {})
            names.pop(session, None)
            if not names:
                self._sessions.pop((party, run), None)

    def take(self, party: str, run: str) -> list[str]:
        """The sessions of the party's other runs that have no stream, which are to be closed; they are not named again."""
        with self._lock:
            gone = [key for key in self._sessions if key[0] == party and key[1] != run and key not in self._streams]
            return [session for key in gone for session in self._sessions.pop(key)]
