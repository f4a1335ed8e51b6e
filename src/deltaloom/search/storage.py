"""Where a study is kept: a journal file that survives `kill -9` at any byte, or a database."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from deltaloom.errors import SettingsError
from deltaloom.events import drop_cut_line

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

SECRET = re.compile(r"(?<=://)[^/@\s]*:[^/@\s]*(?=@)")


class JournalLock:
    """The lock of a journal file, of the face that Optuna's file backend takes.

    Optuna's own locks are files that outlive a killed process, and a line that it cut stays in its journal for ever; this one
    ends with its process, and who takes it removes such a line first.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._handle = path, -1

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._handle = os.open(self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        drop_cut_line(self.path)
        return True

    def release(self) -> None:
        """Give it back."""
        os.close(self._handle)


def is_url(place: str) -> bool:
    """Whether a storage is a database."""
    return "://" in place


def without_secret(text: str) -> str:
    """A text in which the user and password of a URL are blotted out."""
    return SECRET.sub("***", text)


def open_storage(place: str) -> BaseStorage:
    """A journal file, which is made if there is none, or the database of a URL.

    Raises:
        SettingsError: it cannot be opened.
    """
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        if is_url(place):
            return RDBStorage(place, engine_kwargs={"connect_args": _timeout(place)})
        path = Path(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        backend = JournalFileBackend(str(path), lock_obj=JournalLock(path))  # type: ignore[arg-type]  # it is only called
        return JournalStorage(backend)
    except Exception as error:  # drivers of databases raise what they like
        said = without_secret(str(error)).splitlines()
        raise SettingsError("search.storage cannot be opened", got=without_secret(place),
                            hint=f"{said[0] if said else type(error).__name__}. Give a path, or a URL such as "
                                 "sqlite:///search.db or postgresql://user:password@host/name.") from None


def _timeout(url: str) -> dict[str, float]:
    """SQLite gives up at once where another worker writes, unless it is told to wait."""
    return {"timeout": 60.0} if url.startswith("sqlite") else {}
