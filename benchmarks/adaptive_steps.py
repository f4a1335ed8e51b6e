"""Step time and peak memory of the adaptive-rank and tensor methods against LoRA at equal parameters, in turn in one run.

    python benchmarks/adaptive_steps.py --data DIR [--ranks 2 4 8] [--output benchmarks/results/adaptive_steps.json] [--trial]

SmolLM2-135M in bf16, deltas on all linears of the blocks, the same fixed steps of at least 1,024 real tokens of E2E for all.
`rank` is that of LoRA with the same parameters; the adaptive methods start with half as many more and end there, and a
run is their whole schedule, so that the first round sees the reserve and the last one what is left. Our methods are lanes of one
frozen base; `lora again` is a second lane of LoRA and shows the noise. PEFT's AdaLoRA stands against PEFT's LoRA, each a model
of its own, with the allocation after each optimizer step. A step is the loop's own: forward, loss, backward, penalty,
controllers, clip, fused AdamW. Memory: one process each, the peak less what the loaded model takes.
DIR holds e2e.train.jsonl; `--entries` picks some (`full` and `dora` are there for trials of this script).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peers
import torch
from torch.utils.flop_counter import FlopCounterMode

from deltaloom.data.batches import Batch
from deltaloom.data.encode import Example
from deltaloom.deltas.base import method_from
from deltaloom.events import Emitter
from deltaloom.jobs.doctor import environment
from deltaloom.jobs.estimate import block_linears, flops_per_token
from deltaloom.jobs.prepare import Prepared, parse_parts, prepare
from deltaloom.jobs.runfile import parse_run
from deltaloom.models import bundled_path
from deltaloom.sites import Site, all_sites
from deltaloom.train.feed import ExampleFeed
from deltaloom.train.loop import LOSS, Start  # the loop's own: what is timed is what trains
from deltaloom.train.memory import PeakMemory
from deltaloom.train.modes import faster_dropout, training_mode
from deltaloom.train.settings import TrainSettings
from deltaloom.tuned import Tuned

TEMPLATE = "Data: {prompt}\nText:"
LEAST_TOKENS, WARM_UP = 1024, 2
BASELINE, PEER_BASELINE = "lora", "peft lora"
TSVD = ("frame", "haar", "dct", "dft", "identity")
OURS: dict[str, dict[str, Any]] = {
    BASELINE: {"method": "lora"}, "lora again": {"method": "lora"}, "adalora": {"method": "adalora"},
    "tucker1": {"method": "tucker1"}, **{f"tsvd {name}": {"method": "tsvd", "transform": name} for name in TSVD}}
STAND_INS: dict[str, dict[str, Any]] = {"dora": {"method": "dora"}, "full": {"method": "full"}}
PEERS = (PEER_BASELINE, "peft adalora")
PEER_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def record_of(name: str, rank: int) -> dict[str, Any]:
    """The settings of one of our entries."""
    record = {**OURS, **STAND_INS}.get(name, {"method": name})
    return record if record["method"] == "full" else {**record, "rank": rank}


@dataclass
class FixedSteps:
    """A feed of the same steps, again and again in the same order."""

    feed: ExampleFeed
    chosen: list[list[list[int]]]

    def steps(self, epoch: int) -> Sequence[Sequence[Sequence[int]]]:
        return self.chosen

    def batch(self, indices: Sequence[int], device: torch.device) -> Batch:
        return self.feed.batch(indices, device)

    def place(self, row: int) -> str:
        return self.feed.place(row)

    def dealt(self, step: Sequence[Sequence[int]], number: int, size: int) -> Sequence[Sequence[int]]:
        return self.feed.dealt(step, number, size)


@dataclass
class Entry:
    """Something that takes training steps; seconds of each round, operations of its first and last step."""

    name: str
    step: Callable[[], None]
    parameters: Callable[[], int]
    started: int
    rounds: list[float] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)

    def count(self) -> None:
        """One step, not timed: its floating-point operations in matrix products, counted."""
        with FlopCounterMode(display=False) as counter:
            self.step()
        self.flops.append(counter.get_total_flops())

    def time(self, steps: int) -> None:
        """A round: seconds per step."""
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.rounds.append((time.perf_counter() - began) / steps)


def prepared_run(data: Path, batch_size: int) -> Prepared:
    """Model, task and encoded rows as the main job has them."""
    run = parse_run({"model": "bundled:smollm2-135m-instruct", "task": "causal-lm", "deltas": [OURS[BASELINE]],
                     "data": {"train": str(data / "e2e.train.jsonl"), "template": TEMPLATE, "max_rows": 400, "max_length": 256},
                     "train": {"precision": "bf16", "batch_size": batch_size}}, base=Path.cwd())
    return prepare(run, parse_parts(run), say=lambda line: print(line, file=sys.stderr))


def fixed_steps(prepared: Prepared, least: int, most: int = 8) -> FixedSteps:
    """The first steps of the first epoch that have at least so many tokens."""
    feed = ExampleFeed(prepared.examples, prepared.task.collate, prepared.parts.train)
    chosen = [step for step in feed.steps(0) if tokens_of(step, prepared.examples) >= least]
    return FixedSteps(feed, chosen[:most])


def tokens_of(step: Sequence[Sequence[int]], examples: Sequence[Example]) -> int:
    """Real tokens of an optimizer step."""
    return sum(examples[index].length for micro in step for index in micro)


def our_entry(tuned: Tuned, prepared: Prepared, feed: FixedSteps, name: str, rank: int, total: int) -> Entry:
    """A lane with its own optimizer and controllers."""
    lane = f"{name}-{rank}".replace(" ", "-")
    tuned.add(lane, [method_from(record_of(name, rank))], tokenizer=prepared.loaded.tokenizer)
    settings = TrainSettings(max_steps=total, batch_size=prepared.parts.train.batch_size)
    start = Start(tuned, prepared.task, feed, settings, Emitter(), 0, None, LOSS, None, None, None, {})
    with training_mode(tuned, True):
        run = start.run(PeakMemory(tuned.device))  # with initial values from gradients, which are in no time of a step

    def step() -> None:
        with tuned.use(lane):
            run.step()

    return Entry(name, step, lambda: tuned.counts(lane)[0], tuned.counts(lane)[0])


def peer_entry(prepared: Prepared, feed: FixedSteps, name: str, rank: int, total: int) -> Entry:
    """PEFT's method on a model of its own, bf16 adapters (its fastest setting here), the same batches, clip and optimizer."""
    from peft import AdaLoraConfig, LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(bundled_path("smollm2-135m-instruct"), dtype=torch.bfloat16)
    shared = {"task_type": TaskType.CAUSAL_LM, "target_modules": PEER_TARGETS, "lora_alpha": 16}
    adaptive = name == "peft adalora"
    config = (AdaLoraConfig(init_r=math.ceil(1.5 * rank), target_r=rank, tinit=WARM_UP, tfinal=max(1, total // 4), deltaT=1,
                            total_step=total, orth_reg_weight=0.1, **shared) if adaptive else LoraConfig(r=rank, **shared))
    model = get_peft_model(base, config, autocast_adapter_dtype=False).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)
    taken = 0

    def step() -> None:
        nonlocal taken
        micro, taken = feed.chosen[taken % len(feed.chosen)], taken + 1
        rows = [[{"input_ids": e.input_ids, "labels": e.labels} for e in (feed.feed.examples[i] for i in part)] for part in micro]
        count = sum(sum(label != peers.IGNORED for label in row["labels"]) for part in rows for row in part)
        for part in rows:
            model(**peers.pad_causal(part), num_items_in_batch=count).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if adaptive:
            model.base_model.update_and_allocate(taken)
        optimizer.zero_grad()

    size = sum(p.numel() for p in parameters)
    return Entry(name, step, lambda: size, size)  # its masked ranks stay in memory


def measure(prepared: Prepared, feed: FixedSteps, names: Sequence[str], rank: int, rounds: int,
            steps: int) -> list[dict[str, Any]]:
    """All entries in turn; ratios of each round against the baseline of the same side."""
    tuned = Tuned(prepared.loaded.model)
    total = WARM_UP + rounds * steps + 1
    entries = [our_entry(tuned, prepared, feed, name, rank, total) for name in names if name not in PEERS]
    entries += [peer_entry(prepared, feed, name, rank, total) for name in names if name in PEERS]
    with ExitStack() as stack:
        stack.enter_context(training_mode(tuned, True))
        stack.enter_context(faster_dropout(tuned))
        for entry in entries:
            entry.count()
            for _ in range(WARM_UP - 1):
                entry.step()
        for number in range(rounds):
            for entry in entries:
                entry.time(steps)
            print(f"rank {rank}, round {number + 1} of {rounds}: " + ", ".join(f"{e.name} {e.rounds[-1]:.3f} s" for e in entries),
                  flush=True)
        for entry in entries:
            entry.count()
    with tuned.bare():  # the floor looks at the untouched layers
        rows = [row(entry, entries, rank, prepared) for entry in entries]
    tuned.detach()
    return rows


def row(entry: Entry, entries: Sequence[Entry], rank: int, prepared: Prepared) -> dict[str, Any]:
    """The figures of one entry."""
    against = PEER_BASELINE if entry.name in PEERS else BASELINE
    base = next((other for other in entries if other.name == against), None)
    found = {"entry": entry.name, "rank": rank, "against": against, "seconds_per_step": statistics.median(entry.rounds),
             "rounds": entry.rounds, "started_parameters": entry.started, "final_parameters": entry.parameters(),
             "counted_flops_first": entry.flops[0], "counted_flops_last": entry.flops[-1]}
    if base is not None:
        ratios = [mine / its for mine, its in zip(entry.rounds, base.rounds, strict=True)]
        found |= {"ratio": statistics.median(ratios), "ratios": ratios,
                  "counted_ratio_first": entry.flops[0] / base.flops[0], "counted_ratio_last": entry.flops[-1] / base.flops[-1]}
        if entry.name not in PEERS and (used := columns_used(entry.name, prepared)) is not None:
            found["floor_ratio"] = floor(prepared, used * base.parameters()) / floor(prepared, base.parameters())
    return found


def columns_used(name: str, prepared: Prepared) -> float | None:
    """How many times its share of the group's columns a layer multiplies by, at equal parameters; None where it is not known.

    A dense transform over n layers uses every column of the group (n times a layer's share), an orthonormal Haar
    basis about 1 + log2(n) of n, a frame its own and the common ones.
    """
    layers = len({site.layer for site in block_linears(all_sites(prepared.loaded.model))})
    known = {"frame": 2.0, "haar": 1 + math.log2(layers), "dct": float(layers), "dft": float(layers), "identity": 1.0}
    return 1.0 if name in ("lora", "lora again", "adalora") else known.get(name.removeprefix("tsvd ")) if "tsvd" in name else None


def floor(prepared: Prepared, parameters: float) -> int:
    """Operations per token at the floor, see performance.md."""
    sites: list[Site] = all_sites(prepared.loaded.model)
    return flops_per_token(sites, int(parameters), prepared.facts["learned_tokens"] / prepared.facts["tokens"])


def memory_alone(given: argparse.Namespace, name: str, rank: int) -> dict[str, Any]:
    """Peak bytes of one entry, in this process: call it in a fresh one."""
    prepared = prepared_run(given.data, given.batch)
    feed = fixed_steps(prepared, given.least)
    memory = PeakMemory(torch.device("cpu"))
    tuned = Tuned(prepared.loaded.model)
    if name in PEERS:  # it loads its own model, which is part of what PeakMemory sees: taken off again
        model_bytes = sum(p.numel() * p.element_size() for p in prepared.loaded.model.parameters())
        entry = peer_entry(prepared, feed, name, rank, WARM_UP + given.steps)
    else:
        model_bytes = 0
        entry = our_entry(tuned, prepared, feed, name, rank, WARM_UP + given.steps)
    with training_mode(tuned, True), faster_dropout(tuned):
        for _ in range(WARM_UP + given.steps):
            entry.step()
    peak = memory.peak()
    return {"entry": name, "rank": rank, "peak_memory_bytes": None if peak is None else peak - model_bytes}


def in_own_process(given: argparse.Namespace, name: str, rank: int) -> int | None:
    """`memory_alone` in a fresh process."""
    command = [sys.executable, __file__, "--data", str(given.data), "--alone", name, "--ranks", str(rank),
               *(["--trial"] if given.trial else ["--steps", str(given.steps)])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/adaptive_steps.json"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--entries", nargs="+", default=[*OURS, *PEERS])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a round")
    parser.add_argument("--trial", action="store_true", help="2 rounds of 2 small steps, to see whether all of it runs")
    parser.add_argument("--alone", help="an entry whose peak memory is measured in this process; used by the script itself")
    given = parser.parse_args()
    given.batch, given.least = (8, 0) if given.trial else (32, LEAST_TOKENS)
    if given.trial:
        given.rounds, given.steps = 2, 2
    return given


def main() -> None:
    given = parsed()
    if given.alone:
        print(json.dumps(memory_alone(given, given.alone, given.ranks[0])))
        return
    for name in given.entries:
        if name not in PEERS:
            method_from(record_of(name, given.ranks[0]), f"entry {name}")  # what does not exist is told before anything is loaded
    prepared = prepared_run(given.data, given.batch)
    feed = fixed_steps(prepared, given.least)
    rows: list[dict[str, Any]] = []
    result = {"benchmark": "adaptive_steps", "threads": torch.get_num_threads(), "rounds": given.rounds, "steps": given.steps,
              "tokens_per_step": [tokens_of(step, prepared.examples) for step in feed.chosen], "environment": environment(),
              "entries": rows}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    for rank in given.ranks:
        rows += measure(prepared, feed, given.entries, rank, given.rounds, given.steps)
        given.output.write_text(json.dumps(result, indent=1) + "\n")
    for found in rows:
        found["peak_memory_bytes"] = in_own_process(given, found["entry"], found["rank"])
        print(f"{found['entry']}, rank {found['rank']}: ratio {found.get('ratio', math.nan):.3f}, "
              f"peak {(found['peak_memory_bytes'] or 0) / 2**20:.0f} MiB", flush=True)
        given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
