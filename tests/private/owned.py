"""An owner's folder, parties that have joined, services in this process and as processes, for the tests of the service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from deltaloom.private.authority import Authority
from deltaloom.private.client import GrpcChannel, Reconnect, join
from deltaloom.private.membership import Membership, read_invite
from deltaloom.private.messages import Key, LossRequest
from deltaloom.private.policy import Policy, write_policy
from deltaloom.private.process import shared_environment
from deltaloom.private.service import Service
from deltaloom.private.wire.convert import Hello
from tests.private.toy_owner import ToyBack, ToyRounds
from tests.private.wired import FACTS, rows

ROOT = Path(__file__).parents[2]
QUICK = Reconnect(first_wait=0.02, longest_wait=0.3, patience=30.0, keepalive=1.0)


def hello(purpose="training", run="run-1", codec="fp32", **changes) -> Hello:
    return Hello(**{"run": run, "purpose": purpose, "package": "test", "codec": codec, "cut": 2, "method": "toy", "guards": [],
                    "labels": "owner", "fingerprint": FACTS.fingerprint, **changes})


def owner_folder(folder: Path, policy: Policy | None = None) -> Authority:
    authority = Authority.create(folder, "owner")
    write_policy(folder / "policy.yaml", policy or Policy())
    return authority


def joined(authority: Authority, folder: Path, party: str, address: str) -> Membership:
    """A party that has enrolled with the service at an address."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{party}.invite"
    path.touch(mode=0o600)
    path.write_text(json.dumps(authority.invite(party, address).as_dict()))
    invite = read_invite(path)
    member = Membership.prepare(folder / party, invite)
    join(member, invite.key.encode(), invite.certificate.encode(), patience=10)
    return member


@contextmanager
def service(folder: Path, back=None, policy: Policy | None = None, listen="127.0.0.1:0") -> Iterator[Service]:
    """A service in this process; the folder is made if it is not there."""
    if not (folder / "register.json").exists():
        owner_folder(folder, policy)
    running = Service(folder, back or ToyBack(), listen=listen, coordinator=lambda _: ToyRounds(), policy=policy)
    running.start()
    try:
        yield running
    finally:
        running.stop(grace=2)


def cut_off(running: Service) -> None:
    """End a service of this process at once, as far as that can be done without killing the process: no reply leaves any more."""
    running._server.stop(None).wait()
    running._workers.shutdown(wait=True, cancel_futures=True)
    running._held.close()


@contextmanager
def channel(member: Membership, *, reconnect: Reconnect = QUICK, address: str | None = None, **greeting) -> Iterator[GrpcChannel]:
    made = GrpcChannel(member, hello(**greeting), reconnect, address=address)
    try:
        yield made
    finally:
        made.close()


class OwnerProcess:
    """The toy owner as a process of its own, on a port that stays."""

    def __init__(self, folder: Path, seconds: float = 0.0) -> None:
        self.folder, self.seconds = folder, seconds
        self.listen = "127.0.0.1:0"
        self.process: subprocess.Popen | None = None

    @property
    def address(self) -> str:
        return self.listen

    def start(self) -> OwnerProcess:
        status = self.folder / "status.json"
        status.unlink(missing_ok=True)
        environment = shared_environment(dict(os.environ))
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        with (self.folder / "log.jsonl").open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "tests.private.toy_owner", str(self.folder), self.listen,
                                             str(self.seconds)], cwd=ROOT, env=environment, stderr=log, stdout=log)
        until = time.monotonic() + 60
        while not status.exists():
            assert self.process.poll() is None and time.monotonic() < until, (self.folder / "log.jsonl").read_text()[-2000:]
            time.sleep(0.02)
        self.listen = json.loads(status.read_text())["address"]
        return self

    def kill(self) -> None:
        """kill -9, by its id."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(timeout=30)

    def __enter__(self) -> OwnerProcess:
        return self.start()

    def __exit__(self, *error: object) -> None:
        with suppress(ProcessLookupError):
            self.kill()


def step_request(step: int, micro: int = 0) -> LossRequest:
    """A request that depends on its key alone."""
    return LossRequest(Key(step, micro), rows((3, 4), seed=1000 * step + micro), torch.tensor([0, 2, 6]), torch.tensor([1, 2, 3]))
