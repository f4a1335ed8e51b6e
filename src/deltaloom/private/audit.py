"""The owner's audit log: one line for each thing that was done, chained by hash; facts about requests, never their content.

A line is a JSON object; `hash` is the SHA-256 of the hash before it and the line's other fields. Changing, removing or inserting
a line breaks the chain from there on. What the chain cannot show is that lines at the end are missing: for that, somebody else
must have kept a hash (the owner's server tells each party the head when it connects).
A line is handed to the system before the request is answered, so kill -9 loses none; important ones are forced to the disk.
Several processes may write: each looks, under a lock, for what others appended.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import NoReturn

from deltaloom.errors import CheckpointError, UsageError
from deltaloom.files import disk_errors

START = hashlib.sha256(b"deltaloom audit 1").hexdigest()
MOST_LINE_BYTES = 4096
MOST_TEXT = 200
Value = str | int | float | bool | None


@dataclass(frozen=True)
class Head:
    """The end of a log: number of lines, the hash of the last one, and the file's length in bytes."""

    lines: int = 0
    hash: str = START
    bytes: int = 0


class Audit:
    """An append-only log. Opening it checks the whole chain.

    Raises:
        CheckpointError: the chain is broken before its last line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.head = Head()
        with self._lock, _alone(path) as file:
            self._catch_up(file)

    def write(self, who: str, what: str, *, durable: bool = False, **facts: Value) -> Head:
        """Append a line; `facts` are numbers and short words. The new head; raises as `note` does."""
        return self.note(who, what, facts, durable=durable)

    def note(self, who: str, what: str, facts: Mapping[str, Value], *, durable: bool = False) -> Head:
        """Append a line with facts that are a mapping already. The new head.

        Raises:
            UsageError: a fact is too long to be one. ResourceError: the disk is full; the log is as it was.
        """
        record: dict[str, Value] = {"time": round(time.time(), 3), "who": who, "what": what, **facts}
        long = [key for key, value in record.items() if isinstance(value, str) and len(value) > MOST_TEXT]
        if long:
            raise UsageError("the audit log takes facts, not content", got=f"{long[0]} of {len(str(record[long[0]]))} characters",
                             legal=f"up to {MOST_TEXT}")
        with self._lock, _alone(self.path) as file:
            self._catch_up(file)
            self._append(file, record, durable=durable)
            return self.head

    def records(self) -> Iterator[dict[str, Value]]:
        """All lines, checked, as mappings; those that others append meanwhile are left for the next time."""
        for record, _ in _walk(self.path, Head(), self.head.bytes):
            yield record

    def _append(self, file: RawIOBase, record: dict[str, Value], *, durable: bool) -> None:
        head = self.head
        number, digest = head.lines + 1, _digest(head.hash, head.lines + 1, record)
        line = json.dumps({"n": number, **record, "hash": digest}, separators=(",", ":")).encode() + b"\n"
        with disk_errors(self.path):
            try:
                file.seek(head.bytes)
                if file.write(line) != len(line):
                    raise OSError(28, "no space left")
                if durable:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(head.bytes)
                raise
        self.head = Head(number, digest, head.bytes + len(line))

    def _catch_up(self, file: RawIOBase) -> None:
        size = os.fstat(file.fileno()).st_size
        if size == self.head.bytes:
            return
        if size < self.head.bytes:
            raise CheckpointError("the audit log became shorter while it was in use", got=f"{size} bytes",
                                  legal=f"at least {self.head.bytes}", hint="Somebody removed lines; keep the rest as evidence.")
        for _, head in _walk(self.path, self.head, size):
            self.head = head
        torn = size - self.head.bytes
        if torn:
            file.truncate(self.head.bytes)
            note: dict[str, Value] = {"time": round(time.time(), 3), "who": "owner", "what": "torn-line-cut", "bytes": torn}
            self._append(file, note, durable=True)


@contextmanager
def _alone(path: Path) -> Iterator[RawIOBase]:
    """The file, open for as long as this process alone may use it."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)   # given back when the file is closed
        yield file


def verify(path: Path) -> Head:
    """Check a log from its first line to its last; the head that an earlier one can be compared with.

    A last line without its end (the writer was killed) is not counted.

    Raises:
        CheckpointError: it cannot be read, or a line was changed, removed or inserted; names the first such line.
    """
    try:
        size = path.stat().st_size
        heads = [Head()]
        for _, head in _walk(path, Head(), size):
            heads[0] = head
    except OSError as error:
        raise CheckpointError(f"the audit log cannot be read: {error.strerror}", got=str(path)) from None
    return heads[0]


def read_audit(path: Path) -> list[dict[str, Value]]:
    """All whole lines of a log, checked.

    Raises:
        CheckpointError: as `verify`.
    """
    verify(path)
    return [record for record, _ in _walk(path, Head(), path.stat().st_size)]


def _walk(path: Path, head: Head, stop: int) -> Iterator[tuple[dict[str, Value], Head]]:
    """The records after `head`, each with the head that it makes; a last line without a line feed is left out."""
    with path.open("rb") as file:
        file.seek(head.bytes)
        while head.bytes < stop:
            line = file.readline(MOST_LINE_BYTES)
            if not line.endswith(b"\n"):
                if len(line) == MOST_LINE_BYTES:
                    _broken(path, head.lines + 1)
                return
            try:
                record = json.loads(line)
                number, digest = record.pop("n"), record.pop("hash")
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                _broken(path, head.lines + 1)
            if number != head.lines + 1 or digest != _digest(head.hash, number, record):
                _broken(path, head.lines + 1)
            head = Head(number, digest, head.bytes + len(line))
            yield record, head


def _digest(before: str, number: int, record: dict[str, Value]) -> str:
    text = json.dumps({"n": number, **record}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()


def _broken(path: Path, line: int) -> NoReturn:
    raise CheckpointError(f"the chain of {path.name} breaks at line {line}: it or one before it was changed, removed or inserted",
                          got=str(path), hint="Keep the file as evidence; the owner can move it aside and begin a new one.")
