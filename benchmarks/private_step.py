"""What the cut costs: a step of split tuning over loopback against the unsplit step of the same front prefix.

    python benchmarks/private_step.py --data DIR [--threads 1] [--steps 6] [--rounds 3]

SmolLM2 in bf16, prefix on the first two blocks, 32 rows of E2E a step in micro-batches of about 512 tokens, labels at the owner.
The owner is a process of its own behind mutual TLS. With a window of one micro-batch the two processes take turns, so that as
many threads are at work at any moment as in the unsplit run; with a window of four both work at once. Everything in turn in
each round; the median step of each, without the first two steps.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deltaloom import attention
from deltaloom.data.read import read_rows
from deltaloom.data.settings import DataSettings
from deltaloom.deltas.prefix import Prefix
from deltaloom.evaluate.base import task_named
from deltaloom.events import Emitter
from deltaloom.models import load_model
from deltaloom.private.authority import Authority
from deltaloom.private.back import Back
from deltaloom.private.bars import on_front
from deltaloom.private.client import GrpcChannel, join
from deltaloom.private.cut import split
from deltaloom.private.front import FrontModel, Learner
from deltaloom.private.membership import Membership, read_invite
from deltaloom.private.policy import Limits, Policy, write_policy
from deltaloom.private.process import shared_environment
from deltaloom.private.remote import RemoteBack
from deltaloom.private.service import Service
from deltaloom.private.wire.convert import Hello
from deltaloom.train.feed import ExampleFeed
from deltaloom.train.loop import train
from deltaloom.train.settings import TrainSettings
from deltaloom.tuned import attach

MODEL, CUT, ROWS, BATCH, MICRO = "bundled:smollm2-135m-instruct", 2, 256, 32, 512
WARM = 2
WINDOWS = (1, 4)


def loaded() -> Any:
    found = load_model(MODEL, task="causal-lm", dtype=torch.bfloat16)
    attention.install(found.model)
    return found


# ---- the owner's process --------------------------------------------------------------------------------------------

def serve(folder: Path, window: int) -> None:
    """Serve the back until SIGTERM; the address goes to FOLDER/address."""
    _, back = split(loaded().model, "causal-lm", CUT)
    Authority.create(folder, "owner")
    policy = Policy(cut=CUT, limits=Limits(in_flight=window))
    write_policy(folder / "policy.yaml", policy)
    service = Service(folder, Back(back), listen="127.0.0.1:0", policy=policy)
    service.start()
    (folder / "address").write_text(service.address)
    signal.sigwait({signal.SIGTERM})
    service.stop(grace=2)


@contextmanager
def owner(folder: Path, window: int, threads: int) -> Iterator[str]:
    """The address of an owner that serves in a process of its own."""
    folder.mkdir()
    running = subprocess.Popen([sys.executable, __file__, "--owner", str(folder), "--window", str(window)],
                               env=shared_environment(dict(os.environ), threads=threads))
    try:
        while not (folder / "address").exists() or not (folder / "address").read_text():
            if running.poll() is not None:
                sys.exit("the owner did not start")
            time.sleep(0.1)
        yield (folder / "address").read_text()
    finally:
        running.terminate()
        running.wait(30)


def channel(folder: Path, address: str, fingerprint: str) -> GrpcChannel:
    path = folder / "a.invite"
    path.touch(mode=0o600)
    path.write_text(json.dumps(Authority(folder).invite("a", address).as_dict()))
    invite = read_invite(path)
    member = Membership.prepare(folder / "a", invite)
    join(member, invite.key.encode(), invite.certificate.encode(), patience=10)
    return GrpcChannel(member, Hello(run="step", purpose="training", package="benchmark", codec="bf16", cut=CUT, method="prefix",
                                     guards=[], labels="owner", fingerprint=fingerprint))


# ---- the party ------------------------------------------------------------------------------------------------------

class Clock:
    """Seconds between the steps of a run, without the first ones."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, event: Any) -> None:
        if type(event).__name__ == "Step":
            self.at.append(time.perf_counter())

    def step(self) -> float:
        """The median step."""
        return statistics.median(after - before for before, after in zip(self.at[WARM - 1:], self.at[WARM:], strict=False))


def run(tuned: Any, learner: Any, task: Any, examples: Sequence[Any], steps: int, **options: Any) -> float:
    settings = TrainSettings(batch_size=BATCH, max_steps=steps + WARM, learning_rate=1e-2, precision="bf16", schedule="constant")
    clock = Clock()
    train(tuned, learner, ExampleFeed(examples, task.collate, settings, seed=0, micro_tokens=MICRO), settings=settings,
          emit=Emitter([clock]), seed=0, **options)
    return clock.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--owner", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--window", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/private_step.json"))
    given = parser.parse_args()
    if given.owner is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        serve(given.owner, given.window)
        return
    if given.data is None:
        parser.error("--data DIR is needed")
    torch.set_num_threads(given.threads)
    found = measured(given)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def measured(given: argparse.Namespace) -> dict[str, Any]:
    model = loaded()
    settings = DataSettings(train="rows.jsonl", max_length=128, template="Data: {prompt}\nText:")
    kind = task_named("causal-lm")
    rows = read_rows([str(given.data / "e2e.train.jsonl")], settings, Path.cwd(), accepts=kind.formats, numbers=False).rows[:ROWS]
    task = kind(settings, kind.prepare(settings, rows, []), model.model.config, tokenizer=model.tokenizer)
    examples = task.encode(rows)
    front, back = split(model.model, "causal-lm", CUT)
    method, fingerprint = on_front(Prefix(length=16), front), Back(back).facts.fingerprint
    times: dict[str, list[float]] = {name: [] for name in ("unsplit", *(f"window {window}" for window in WINDOWS))}
    for _ in range(given.rounds):
        tuned = attach(model.model, [method], tokenizer=model.tokenizer)
        times["unsplit"].append(run(tuned, task, task, examples, given.steps))
        tuned.detach()
        for window in WINDOWS:
            with tempfile.TemporaryDirectory() as temporary, owner(Path(temporary) / "owner", window, given.threads) as address:
                wire = channel(Path(temporary) / "owner", address, fingerprint)
                tuned = attach(front.model, [method], tokenizer=model.tokenizer)
                remote = RemoteBack(wire, front, run="step")
                learner = Learner(task, FrontModel(tuned, front, remote, "owner"))
                times[f"window {window}"].append(run(tuned, learner, task, examples, given.steps, ahead=wire.window,
                                                     before_step=remote.begin))
                tuned.detach()
                wire.close()
        print({name: [round(value, 2) for value in values] for name, values in times.items()}, file=sys.stderr, flush=True)
    return {"benchmark": "private_step", "threads_each": given.threads, "rows": BATCH, "micro_tokens": MICRO,
            "seconds": {name: statistics.median(values) for name, values in times.items()},
            "of_unsplit": {name: statistics.median(mine / plain for mine, plain in zip(values, times["unsplit"], strict=True))
                           for name, values in times.items()}, "rounds": times}


if __name__ == "__main__":
    main()
