"""Structured logs: one JSON object a line on stderr, with facts and never content."""

from __future__ import annotations

import json
import logging
import sys
from typing import TextIO

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
