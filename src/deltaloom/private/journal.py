"""Structured logs: one JSON object a line on stderr, with facts and never content."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from deltaloom.private.audit import Audit
    from deltaloom.private.rounds import Happened

LOGGER = logging.getLogger("deltaloom.private")
LOGGER.addHandler(logging.NullHandler())


class _JsonLines(logging.Formatter):
    """A record as one JSON line: time, level, event, and its facts."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        facts = getattr(record, "facts", {})
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "event": record.getMessage(), **facts}
        return json.dumps(line, default=str)


def log(event: str, *, level: int = logging.INFO, **facts: object) -> None:
    """Note an event with its facts."""
    LOGGER.log(level, event, extra={"facts": facts})


def log_to(stream: TextIO | None = None, level: int = logging.INFO) -> logging.Handler:
    """Write the logs as JSON lines to a stream (stderr); the handler, to be removed again."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonLines())
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level)
    LOGGER.propagate = False
    return handler


def note_rounds(audit: Audit) -> Callable[[Happened], None]:
    """What a coordinator of rounds tells, into the audit log and the log: rounds, phases, parties, never values."""

    def tell(happened: Happened) -> None:
        facts: dict[str, int | str] = {"round": happened.round, "phase": happened.phase,
                                       "parties": ",".join(happened.parties)[:200]}
        audit.note("owner", f"round-{happened.what}", facts, durable=happened.what == "published")
        log(f"round {happened.what}", facts=facts)

    return tell
