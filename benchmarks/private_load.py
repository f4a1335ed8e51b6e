"""Load on an owner: parties that all train, evaluate and write at the same time, for minutes, without an error or growing memory.

    python benchmarks/private_load.py [--minutes 10] [--parties 8] [--model toy]

One owner process behind mutual TLS on loopback; the parties are threads of this process, each with its front, its prefix, its
channel and a window of two micro-batches. A party's turn is a training step of two micro-batches of four rows; every tenth an
evaluation follows, every twentieth a text of 16 tokens is decoded on a stream of its own. Written: steps of each minute, errors,
the latency that a party sees for each kind of request (median, 95%, 99%, largest, in ms), and the owner's resident memory, read
each second: the mean of the first minute against that of the last (of a run of under three minutes: of thirds). `after_the_first`
is the growth once the first minute, in which everything is used for the first time, is over.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from deltaloom import attention
from deltaloom.deltas.prefix import Prefix
from deltaloom.files import write_atomic
from deltaloom.models import load_model
from deltaloom.private.audit import verify
from deltaloom.private.authority import Authority
from deltaloom.private.back import Back
from deltaloom.private.bars import on_front
from deltaloom.private.client import GrpcChannel, join
from deltaloom.private.cut import Half, split
from deltaloom.private.membership import Membership, read_invite
from deltaloom.private.messages import CloseRequest, ExtendRequest, OpenRequest, Reply, Request, Rows
from deltaloom.private.policy import Policy, write_policy
from deltaloom.private.process import shared_environment
from deltaloom.private.remote import Packing, RemoteBack
from deltaloom.private.replay import run_front
from deltaloom.private.service import Service
from deltaloom.private.wire.convert import Hello
from deltaloom.tuned import attach

CUT, ROWS, MICROS, LONGEST, TOKENS = 1, 4, 2, 48, 16
EVALUATE, WRITE = 10, 20  # turns between two evaluations, two texts


def loaded(name: str) -> PreTrainedModel:
    """A toy of four blocks, the same in every process, or a model by its name."""
    if name != "toy":
        model = load_model(name, task="causal-lm", dtype=torch.float32).model
    else:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256))
    attention.install(model)
    return model


# ---- the owner's process --------------------------------------------------------------------------------------------

def serve(folder: Path, name: str) -> None:
    """Serve the back until SIGTERM; the address goes to FOLDER/address."""
    _, back = split(loaded(name), "causal-lm", CUT)
    Authority.create(folder, "owner")
    policy = Policy(cut=CUT)
    write_policy(folder / "policy.yaml", policy)
    service = Service(folder, Back(back), listen="127.0.0.1:0", policy=policy)
    service.start()
    write_atomic(folder / "address", service.address)
    signal.sigwait({signal.SIGTERM})
    write_atomic(folder / "metrics.json", json.dumps(service.status()))
    service.stop(grace=2)


@contextmanager
def owner(folder: Path, name: str) -> Iterator[tuple[str, int]]:
    """(address, process id) of an owner that serves in a process of its own."""
    folder.mkdir()
    running = subprocess.Popen([sys.executable, __file__, "--owner", str(folder), "--model", name],
                               env=shared_environment(dict(os.environ)))
    try:
        while not (folder / "address").exists():
            if running.poll() is not None:
                sys.exit("the owner did not start")
            time.sleep(0.1)
        yield (folder / "address").read_text(), running.pid
    finally:
        running.terminate()
        running.wait(60)


def resident(process: int) -> float:
    """MB of memory that a process holds."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


# ---- the parties ----------------------------------------------------------------------------------------------------

class Timed:
    """A channel that notes how long each request took."""

    def __init__(self, channel: GrpcChannel, seen: dict[str, list[float]]) -> None:
        self._channel, self._seen = channel, seen

    @property
    def facts(self) -> Any:
        return self._channel.facts

    @property
    def window(self) -> int:
        return self._channel.window

    def submit(self, request: Request) -> Future[Reply]:
        began, kind = time.perf_counter(), type(request).__name__
        future = self._channel.submit(request)
        future.add_done_callback(lambda _: self._seen[kind].append(time.perf_counter() - began))
        return future

    def close(self) -> None:
        self._channel.close()


class Party(threading.Thread):
    """Trains, evaluates and writes until it is told to stop."""

    def __init__(self, name: str, front: Half, channels: tuple[GrpcChannel, GrpcChannel], stop: threading.Event) -> None:
        super().__init__(name=name)
        self.seen: dict[str, list[float]] = defaultdict(list)
        self.errors: Counter[str] = Counter()
        self.turns: list[float] = []
        self._front, self._stop_at = front, stop
        self._channel, self._writing = (Timed(channel, self.seen) for channel in channels)
        self._tuned = attach(front.model, [on_front(Prefix(length=8, init="random"), front)])
        self._remote = RemoteBack(self._channel, front, run=secrets.token_hex(8))
        self._generator = torch.Generator().manual_seed(sum(map(ord, name)))

    def run(self) -> None:
        optimizer = torch.optim.SGD(list(self._tuned.delta_parameters().values()), lr=1e-3)
        turn = 0
        while not self._stop_at.is_set():
            turn += 1
            try:
                self._step(turn, optimizer)
                if turn % EVALUATE == 0:
                    with torch.no_grad():
                        self._remote.scores(*self._rows())
                if turn % WRITE == 0:
                    self._write(turn)
                self.turns.append(time.monotonic())
            except Exception as error:  # whatever it is, it is counted and the load goes on
                self.errors[f"{type(error).__name__}: {str(error)[:120]}"] += 1
                time.sleep(0.1)
        self._channel.close()
        self._writing.close()

    def _rows(self) -> tuple[torch.Tensor, Packing, torch.Tensor, torch.Tensor]:
        """Hidden states of random rows of one length, and the places that are scored."""
        length = int(torch.randint(8, LONGEST, (), generator=self._generator))
        ids = torch.randint(3, int(self._front.config.vocab_size), (ROWS, length), generator=self._generator)
        hidden = run_front(self._front.model, {"input_ids": ids}, self._front.is_decoder).flatten(0, 1)
        places = torch.arange(ROWS * length).view(ROWS, length)[:, :-1].flatten()
        return hidden, Packing((length,) * ROWS, "padded"), places, ids[:, 1:].flatten()

    def _step(self, turn: int, optimizer: torch.optim.Optimizer) -> None:
        self._remote.begin(turn)
        losses = [self._remote.loss(*self._rows()) for _ in range(MICROS)]
        for loss in losses:
            loss.backward()
            if not torch.isfinite(loss.detach()):
                raise ValueError("a loss is not finite")
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def _write(self, turn: int) -> None:
        """A text, without a cache at this end: the load is the owner's."""
        session = f"{self.name}-{turn}"
        ids = torch.randint(3, 100, (1, 8), generator=self._generator)
        self._writing.submit(OpenRequest(session, 8 + TOKENS)).result(120)
        sent = 0
        for _ in range(TOKENS):
            hidden = run_front(self._front.model, {"input_ids": ids}, self._front.is_decoder)[0, sent:].contiguous()
            reply: Any = self._writing.submit(ExtendRequest(session, Rows(hidden, (len(hidden),), (sent,), "padded"))).result(120)
            sent = ids.shape[1]
            ids = torch.cat([ids, torch.tensor([[reply.token]])], dim=1)
        self._writing.submit(CloseRequest(session)).result(120)


def joined(folder: Path, name: str, address: str, fingerprint: str) -> tuple[GrpcChannel, GrpcChannel]:
    """A party's streams for training and for inference, enrolled with a one-time invite."""
    path = folder / f"{name}.invite"
    path.touch(mode=0o600)
    path.write_text(json.dumps(Authority(folder).invite(name, address).as_dict()))
    invite = read_invite(path)
    member = Membership.prepare(folder / name, invite)
    join(member, invite.key.encode(), invite.certificate.encode(), patience=60)
    training, inference = (GrpcChannel(member, Hello(run=f"{name}-{purpose}", purpose=purpose, package="benchmark", codec="bf16",
                                                     cut=CUT, method="prefix", guards=[], labels="owner",
                                                     fingerprint=fingerprint)) for purpose in ("training", "inference"))
    return training, inference


def quantiles(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(seconds)
    at = {"median": 0.5, "p95": 0.95, "p99": 0.99, "largest": 1.0}
    return {"requests": len(ordered), **{name: round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)
                                         for name, share in at.items()}}


def memory(samples: list[float]) -> dict[str, float]:
    """The first minute against the last, or the first third against the last."""
    part = 60 if len(samples) >= 180 else max(1, len(samples) // 3)
    first, last = statistics.mean(samples[:part]), statistics.mean(samples[-part:])
    second = statistics.mean(samples[part:2 * part] or samples)
    return {"first": round(first, 1), "last": round(last, 1), "growth": round(last - first, 1),
            "after_the_first": round(last - second, 1), "largest": round(max(samples), 1)}


def loaded_for(minutes: float, count: int, name: str) -> dict[str, Any]:
    """The figures of one run."""
    stop, samples = threading.Event(), []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "owner"
        with owner(folder, name) as (address, process):
            fronts = [split(loaded(name), "causal-lm", CUT)[0] for _ in range(count)]
            names = [f"party-{index}" for index in range(count)]
            parties = [Party(each, front, joined(folder, each, address, front.fingerprint), stop)
                       for each, front in zip(names, fronts, strict=True)]
            began = time.monotonic()
            for party in parties:
                party.start()
            while time.monotonic() - began < 60 * minutes:
                samples.append(resident(process))
                time.sleep(1.0)
            stop.set()
            for party in parties:
                party.join(180)
        served = json.loads((folder / "metrics.json").read_text())
        lines = verify(folder / "audit.jsonl").lines
    seen: dict[str, list[float]] = defaultdict(list)
    errors: Counter[str] = Counter()
    for party in parties:
        errors += party.errors
        for kind, seconds in party.seen.items():
            seen[kind] += seconds
    turns = sorted(at - began for party in parties for at in party.turns)
    each = [sum(1 for at in turns if 60 * minute <= at < 60 * (minute + 1)) for minute in range(max(1, int(minutes)))]
    return {"model": name, "parties": count, "minutes": minutes, "steps": len(turns), "steps_each_minute": each,
            "steps_of_parties": [len(party.turns) for party in parties],
            "errors": dict(errors), "latency_ms": {kind: quantiles(seconds) for kind, seconds in sorted(seen.items())},
            "owner_memory_mb": memory(samples), "memory_each_10_s": [round(sample, 1) for sample in samples[::10]],
            "refused": served.get("refused", {}), "audit_lines": lines, "alive": sum(party.is_alive() for party in parties)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--owner", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--parties", type=int, default=8)
    parser.add_argument("--model", default="toy")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/private_load.json"))
    given = parser.parse_args()
    if given.owner is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        serve(given.owner, given.model)
        return
    torch.set_num_threads(1)
    found = loaded_for(given.minutes, given.parties, given.model)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(given.output, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    if found["errors"] or found["alive"]:
        sys.exit("the load ended with errors")


if __name__ == "__main__":
    main()
