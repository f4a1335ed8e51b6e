"""Which workers of a search live: each holds the lock of a slot, and a lock ends with its process, however that ended."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltaloom.errors import RefusedError

MOST = 256


class Slot:
    """The place of one worker among those of a run folder, from 0; held until `close` or the end of the process."""

    def __init__(self, folder: Path, number: int, handle: int) -> None:
        self.folder, self.number, self._handle = folder, number, handle

    @classmethod
    def take(cls, folder: Path) -> Slot:
        """The first free slot of a run folder.

        Raises:
            RefusedError: there are too many workers.
        """
        for number in range(MOST):
            handle = _try(_path(folder, number))
            if handle is not None:
                return cls(folder, number, handle)
        raise RefusedError("there are too many workers in this folder", got=MOST, hint="Wait for one to end.")

    @property
    def worker(self) -> str:
        """What trials note of their worker: the machine and the slot."""
        return f"{socket.gethostname()}/{self.number}"

    def gone(self, worker: str | None) -> bool:
        """Whether the worker of a running trial is no more; of another machine that cannot be told, and it is taken to live.

        Must be asked under `one_at_a_time`. A trial without a worker was cut off before it could name it.
        """
        if worker is None or worker == self.worker:
            return True
        host, _, number = worker.rpartition("/")
        if host != socket.gethostname() or not number.isdigit():
            return False
        handle = _try(_path(self.folder, int(number)))
        if handle is not None:
            os.close(handle)
        return handle is not None

    def close(self) -> None:
        """Give the slot back."""
        os.close(self._handle)


def busy(folder: Path) -> bool:
    """Whether a worker of this machine holds a slot of the folder."""
    for path in (folder / "workers").glob("*.lock"):
        handle = _try(path)
        if handle is None:
            return True
        os.close(handle)
    return False


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Only one worker of this machine is in such a block."""
    handle = _opened(folder / "workers" / "ask")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _path(folder: Path, number: int) -> Path:
    return folder / "workers" / f"{number}.lock"


def _opened(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _try(path: Path) -> int | None:
    handle = _opened(path)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle
