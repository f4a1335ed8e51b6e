"""Eight trials trained as a cohort against the same trials one after another: the gain of cohorts alone, step by step.

    python benchmarks/cohorts.py --data DIR [--tasks sst2 e2e] [--rows 4 16 64] [--threads 1] [--rounds 5]
        [--precision auto] [--trial]

`sst2`: MiniLM, sequence classification with its head; `e2e`: SmolLM2-135M; each in the precision that the machine is fast in.
LoRA of rank 4 to 16 at learning rates from 3e-4 to 3e-3, all linears of the blocks. In every round each side takes the same
number of steps of the same rows: all trials in turn, each alone on its model, then all trials in common passes; the ratio is
that of the round. A step is the loop's own: batch, passes, penalty, clip, optimizer, readings and events; evaluations and
checkpoints cost both sides the same and are left out. `differs` is the largest difference of the last step's losses between the
sides, relative: they train the same trials. With --precision fp32 it is rounding alone.
DIR holds sst2.train.jsonl and e2e.train.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from deltaloom.deltas.lora import LoRA
from deltaloom.events import Emitter, Event, Step
from deltaloom.jobs.doctor import environment
from deltaloom.jobs.prepare import Prepared, head_methods, parse_parts, prepare
from deltaloom.jobs.runfile import parse_run
from deltaloom.train.cohort import Cohort
from deltaloom.train.feed import ExampleFeed
from deltaloom.train.loop import LOSS, Start
from deltaloom.train.memory import PeakMemory
from deltaloom.train.modes import faster_dropout, training_mode
from deltaloom.train.run import Run
from deltaloom.train.settings import TrainSettings
from deltaloom.train.state import random_states, set_random_states
from deltaloom.tuned import Tuned

TRIALS, WARM_UP = 8, 2
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"model": "bundled:minilm", "task": "sequence-classification",
             "data": {"train": "sst2.train.jsonl", "max_length": 128, "max_rows": 2000}},
    "e2e": {"model": "bundled:smollm2-135m-instruct", "task": "causal-lm",
            "data": {"train": "e2e.train.jsonl", "template": "Data: {prompt}\nText:", "max_length": 256, "max_rows": 1000}}}


@dataclass
class Side:
    """One way to take a step of all trials; seconds of each round, and each trial's losses."""

    losses: dict[str, float] = field(default_factory=dict)
    rounds: list[float] = field(default_factory=list)

    def sink(self, lane: str) -> Emitter:
        def note(event: Event) -> None:
            if isinstance(event, Step):
                self.losses[lane] = event.loss
        return Emitter([note])


def prepared_task(name: str, data: Path, precision: str = "auto") -> Prepared:
    """Model, task and rows as the main job has them."""
    values = TASKS[name] | {"train": {"precision": precision}, "deltas": [{"method": "lora"}], "seed": 0}
    values["data"] = values["data"] | {"train": str(data / values["data"]["train"])}
    run = parse_run(values, base=Path.cwd())
    return prepare(run, parse_parts(run), say=lambda line: None)


def start(tuned: Tuned, ready: Prepared, rows: int, steps: int, side: Side, number: int) -> Start:
    """A trial on a lane of its own: ranks and learning rates spread as a search spreads them."""
    methods = (LoRA(rank=(4, 8, 16)[number % 3], alpha=16),)
    with tuned.bare() as model:
        heads = head_methods(replace(ready.loaded, model=model), methods)
    tuned.add(f"trial-{number}", methods, heads=heads, tokenizer=ready.loaded.tokenizer)
    settings = TrainSettings(max_steps=steps, batch_size=rows, learning_rate=3e-4 * 10 ** (number / (TRIALS - 1)))
    feed = ExampleFeed(ready.examples, ready.task.collate, settings, seed=0)
    return Start(tuned, ready.task, feed, settings, side.sink(str(number)), 0, None, LOSS, None, None, None, {})


@dataclass
class InTurn(Side):
    """Each trial by the loop's own step, alone on a model of its own, whose frozen tensors all share."""

    runs: list[tuple[Run, dict[str, Any]]] = field(default_factory=list)

    def begin(self, ready: Prepared, rows: int, steps: int, stack: ExitStack) -> None:
        model = ready.loaded.model
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        for number in range(TRIALS):
            tuned = Tuned(copy.deepcopy(model, dict(shared)))
            own = start(tuned, ready, rows, steps, self, number)
            stack.enter_context(training_mode(tuned, True))
            stack.enter_context(faster_dropout(tuned))
            self.runs.append((own.run(PeakMemory(tuned.device, shared=True)), random_states()))

    def steps(self, count: int) -> float:
        """Seconds of that many steps of each trial, one trial after another."""
        began = time.perf_counter()
        for index, (run, states) in enumerate(self.runs):
            set_random_states(states)
            for _ in range(count):
                run.step()
            self.runs[index] = (run, random_states())
        return time.perf_counter() - began


@dataclass
class InCommon(Side):
    """The trials as a cohort."""

    def steps(self, cohort: Cohort, count: int) -> float:
        """Seconds of that many steps of all trials."""
        began = time.perf_counter()
        for _ in range(count):
            for left in cohort.step():
                raise RuntimeError(f"a trial ended: {left.outcome}")
        return time.perf_counter() - began


def measure(ready: Prepared, rows: int, rounds: int, steps: int) -> dict[str, Any]:
    """Both sides in turn, round by round."""
    turn, common, total = InTurn(), InCommon(), WARM_UP + rounds * steps + 1
    with ExitStack() as stack:
        turn.begin(ready, rows, total, stack)
        tuned = Tuned(ready.loaded.model)
        stack.callback(tuned.detach)
        cohort = stack.enter_context(Cohort(tuned, ready.task))
        for number in range(TRIALS):
            cohort.join(start(tuned, ready, rows, total, common, number), f"trial-{number}")
        apart = [member.apart for member in cohort.members if member.apart]
        for number in range(rounds + 1):
            count = steps if number else WARM_UP
            taken = turn.steps(count), common.steps(cohort, count)
            if number:
                turn.rounds.append(taken[0])
                common.rounds.append(taken[1])
                print(f"{rows} rows, round {number} of {rounds}: in turn {taken[0]:.2f} s, in common {taken[1]:.2f} s, "
                      f"{taken[0] / taken[1]:.2f} times as fast", flush=True)
        tokens = [member.run.progress.tokens / member.run.progress.step for member in cohort.members]
    ratios = [one / other for one, other in zip(turn.rounds, common.rounds, strict=True)]
    differs = max(abs(turn.losses[lane] - common.losses[lane]) / abs(turn.losses[lane]) for lane in turn.losses)
    return {"rows": rows, "trials": TRIALS, "steps": steps, "tokens_per_step": statistics.mean(tokens),
            "ratio": statistics.median(ratios), "ratios": ratios,
            "in_turn_seconds": turn.rounds, "in_common_seconds": common.rounds, "apart": apart, "differs": differs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["sst2"])
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="steps of each trial in a round")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cohorts.json"))
    parser.add_argument("--trial", action="store_true", help="one round of two steps, to see whether all of it runs")
    given = parser.parse_args()
    if given.trial:
        given.rounds, given.steps = 1, 2
    torch.set_num_threads(given.threads)
    entries: list[dict[str, Any]] = []
    result = {"benchmark": "cohorts", "threads": given.threads, "environment": environment(), "entries": entries}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    for name in given.tasks:
        ready = prepared_task(name, given.data, given.precision)
        for rows in given.rows:
            entries.append({"task": name, "precision": ready.precision, **measure(ready, rows, given.rounds, given.steps)})
            given.output.write_text(json.dumps(result, indent=1) + "\n")
    for entry in entries:
        print(f"{entry['task']}, {entry['rows']} rows ({entry['tokens_per_step']:.0f} tokens): {entry['ratio']:.2f} times as "
              f"fast in common, losses differ by at most {entry['differs']:.1e}")


if __name__ == "__main__":
    main()
