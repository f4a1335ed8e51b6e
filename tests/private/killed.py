"""Real processes that tests kill with SIGKILL: the jobs behind the commands, forked from a server that has imported everything.

A restart then costs a fraction of a second, so that a test can afford dozens of them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from deltaloom.jobs import party_tune, party_use, serve
from deltaloom.jobs.runfile import read_run_file
from deltaloom.private.remote import RemoteBack

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
STEP_SECONDS = 0.02  # of a toy's step, that kills may hit it


class Killable:
    """A process that may be killed and started again; what it says goes to a file."""

    def __init__(self, log: Path, call: Callable[..., None], *arguments: Any) -> None:
        self.log, self.call, self.arguments = log, call, arguments
        self.process: Any = None

    def start(self) -> Killable:
        self.process = CONTEXT.Process(target=_run, args=(self.log, self.call, self.arguments))
        self.process.start()
        return self

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def finish(self, seconds: float = 240) -> None:
        """Wait for an end without error."""
        self.process.join(seconds)
        assert self.process.exitcode == 0, (self.process.exitcode, self.log.read_text()[-3000:])

    def __enter__(self) -> Killable:
        return self.start()

    def __exit__(self, *error: object) -> None:
        if self.running:
            self.kill()


class KillableOwner(Killable):
    """A serving owner, on an address that stays."""

    def __init__(self, folder: Path, model: Path, rounds: serve.Rounds | None = None) -> None:
        super().__init__(folder.parent / "owner.log", _serve, folder, model, rounds)
        self.folder, self.address = folder, "127.0.0.1:0"

    def start(self) -> KillableOwner:
        status = self.folder / "status.json"
        status.unlink(missing_ok=True)
        self.arguments = (*self.arguments[:3], self.address)
        super().start()
        until = time.monotonic() + 120
        while True:
            with suppress(OSError, ValueError, KeyError):
                self.address = str(json.loads(status.read_text())["address"])
                return self
            assert self.running and time.monotonic() < until, self.log.read_text()[-3000:]
            time.sleep(0.02)


def _run(log: Path, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(handle, stream)
    call(*arguments)


def _serve(folder: Path, model: Path, rounds: serve.Rounds | None, listen: str) -> None:
    serve.serve(folder, serve.Served(str(model), cut=1), listen=listen, rounds=rounds)


def tune(party: Path, run: Path, overwrite: bool = False) -> None:
    """`party tune`, with slow steps."""
    begin = RemoteBack.begin

    def slow(self: RemoteBack, step: int) -> None:
        time.sleep(STEP_SECONDS)
        begin(self, step)

    RemoteBack.begin = slow  # type: ignore[method-assign]
    party_tune.tune(party, read_run_file(run), overwrite=overwrite)


def predict(party: Path, data: Path, output: Path) -> None:
    """`party predict`."""
    party_use.predict(party, [data], output, max_new_tokens=24, overwrite=True)
