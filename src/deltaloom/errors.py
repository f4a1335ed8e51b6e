"""The errors of deltaloom: every message says what is wrong, the value got, what is legal, the next step.

`exit_code` is what the command line returns for each kind (a promise of the documentation).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeltaloomError(Exception):
    """Base of all errors that a user can act upon; `problems` holds the single findings, if there were several."""

    exit_code = 1
    known_to_all = False  # of a run in several processes: every one of them raises it, so that the first speaks for all

    def __init__(self, what: str, *, got: object = None, legal: object = None, hint: str | None = None,
                 problems: Iterable[str] = ()) -> None:
        self.problems = tuple(problems)
        parts = [what.rstrip(".")]
        if got is not None:
            parts.append(f"got {got!r}" if not isinstance(got, str) else f"got '{got}'")
        if legal is not None:
            parts.append(f"legal: {listed(legal)}")
        message = "; ".join(parts)
        message += "" if message.endswith("?") else "."
        if hint:
            message += f" {hint}"
        if self.problems:
            message += "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(message)


class UsageError(DeltaloomError):
    """Wrong usage, configuration or data: nothing was started."""

    exit_code = 2


class SettingsError(UsageError):
    """A key or value of a run file or of a method's settings is not legal."""


class DataError(UsageError):
    """Rows or files of data cannot be used; `problems` names file and line."""


class TargetError(UsageError):
    """A target pattern matches nothing, or matches what the method cannot change."""


class CheckpointError(UsageError):
    """A delta or checkpoint is missing, damaged, or belongs to another base."""


class RefusedError(UsageError):
    """What was asked for cannot be done exactly; the message has the reason."""


class ResourceError(DeltaloomError):
    """No memory or no disk space."""

    exit_code = 3


class NonFiniteError(DeltaloomError):
    """The loss or a gradient became NaN or infinite."""


class ElsewhereError(DeltaloomError):
    """Another process of a run in several processes failed, or is gone."""


class Interrupted(DeltaloomError):
    """The run was interrupted after everything was saved."""

    exit_code = 130


def listed(legal: object, most: int = 12) -> str:
    """One line for a set of legal values, cut after `most`."""
    if isinstance(legal, str) or not isinstance(legal, Iterable):
        return str(legal)
    values = [str(value) for value in legal]
    return ", ".join(values[:most]) + (f", ... ({len(values)} in all)" if len(values) > most else "")


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The legal word that resembles `word` most, or None."""
    found = difflib.get_close_matches(word, [str(w) for w in words], n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """A sentence `Did you mean 'x'?`, or nothing."""
    found = nearest(word, words)
    return f"Did you mean '{found}'?" if found else ""
