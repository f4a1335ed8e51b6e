"""LoRA on SmolLM2 stored as NF4 and int8 against bf16: loss at equal steps on E2E, step time, memory of loading and training.

    python benchmarks/quantised.py --data DIR [--output benchmarks/results/quantised.json] [--trial] [--parts load steps loss]

DIR holds e2e.train.jsonl and e2e.dev.jsonl.
load: the peak while the model is loaded, less what the process took before, each in a process of its own; `besides_embeddings`
is that without the bytes of the embeddings, which no form changes.
steps: training steps of at least 1,024 real tokens on the same batches, the forms in turn; ratios of each round against bf16.
loss: whole runs as `deltaloom tune` makes them, the same rows and steps; evaluation loss and its ratio against bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from adaptive_steps import FixedSteps, fixed_steps, tokens_of

from deltaloom.compact.face import model_bytes
from deltaloom.deltas.lora import LoRA
from deltaloom.events import Emitter
from deltaloom.jobs.doctor import environment
from deltaloom.jobs.prepare import Prepared, parse_parts, prepare
from deltaloom.jobs.runfile import parse_run
from deltaloom.jobs.tune import tune
from deltaloom.train.loop import LOSS, Start  # the loop's own: what is timed is what trains
from deltaloom.train.memory import PeakMemory
from deltaloom.train.modes import faster_dropout, training_mode
from deltaloom.train.run import Run
from deltaloom.train.settings import TrainSettings
from deltaloom.tuned import attach

MODEL = "bundled:smollm2-135m-instruct"
TEMPLATE = "Data: {prompt}\nText:"
FORMS = ("bf16", "nf4", "int8")
LEAST_TOKENS, WARM_UP = 1024, 2


def quantise(form: str) -> str | None:
    return None if form == "bf16" else form


def run_values(given: argparse.Namespace, form: str, **train: Any) -> dict[str, Any]:
    """A run file on E2E."""
    data = {"train": str(given.data / "e2e.train.jsonl"), "template": TEMPLATE, "max_length": 256}
    return {"model": MODEL, "task": "causal-lm", "data": data, "base": {"quantise": quantise(form)},
            "deltas": [{"method": "lora", "rank": 8, "alpha": 16}], "train": {"precision": "bf16", **train}}


def load_alone(form: str) -> dict[str, Any]:
    """Peak of loading in this process: call it in a fresh one."""
    import transformers.models.llama.modeling_llama  # noqa: F401  (what would be imported while the model is loaded)

    from deltaloom.models.load import load_model

    memory = PeakMemory(torch.device("cpu"))
    began = time.perf_counter()
    model = load_model(MODEL, task="causal-lm", dtype=torch.bfloat16, quantise=quantise(form)).model
    seconds, peak = time.perf_counter() - began, memory.peak()
    embeddings = model.get_input_embeddings().weight
    size = embeddings.numel() * embeddings.element_size()
    return {"form": form, "peak_bytes": peak, "besides_embeddings": None if peak is None else peak - size, "seconds": seconds,
            "model_bytes": model_bytes(model)}


def measure_loading() -> list[dict[str, Any]]:
    """Each form in a process of its own."""
    rows: list[dict[str, Any]] = []
    for form in FORMS:
        done = subprocess.run([sys.executable, __file__, "--alone", form], check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        first = rows[0] if rows else row
        if row["peak_bytes"] is not None:
            row["ratio"] = row["besides_embeddings"] / first["besides_embeddings"]
        rows.append(row)
        print(f"load {form}: {row}", flush=True)
    return rows


def prepared_run(given: argparse.Namespace, form: str) -> Prepared:
    values = run_values(given, form, batch_size=given.batch)
    values["data"] |= {"max_rows": 400}
    run = parse_run(values, base=Path.cwd())
    return prepare(run, parse_parts(run), say=lambda line: print(line, file=sys.stderr))


def stepper(prepared: Prepared, feed: FixedSteps, total: int) -> Run:
    tuned = attach(prepared.loaded.model, [LoRA(rank=8, alpha=16)])
    settings = TrainSettings(max_steps=total, batch_size=prepared.parts.train.batch_size)
    start = Start(tuned, prepared.task, feed, settings, Emitter(), 0, None, LOSS, None, None, None, {})
    return start.run(PeakMemory(tuned.device))


def measure_steps(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step, in turn."""
    total = WARM_UP + given.rounds * given.steps
    runs: dict[str, Run] = {}
    tokens: list[int] = []
    for form in FORMS:
        prepared = prepared_run(given, form)
        feed = fixed_steps(prepared, given.least)
        tokens = [tokens_of(step, prepared.examples) for step in feed.chosen]
        runs[form] = stepper(prepared, feed, total)
    rounds: dict[str, list[float]] = {form: [] for form in FORMS}
    with ExitStack() as stack:
        for run in runs.values():
            stack.enter_context(training_mode(run.tuned, True))
            stack.enter_context(faster_dropout(run.tuned))
            for _ in range(WARM_UP):
                run.step()
        for number in range(given.rounds):
            for form, run in runs.items():
                began = time.perf_counter()
                for _ in range(given.steps):
                    run.step()
                rounds[form].append((time.perf_counter() - began) / given.steps)
            print(f"round {number + 1}: " + ", ".join(f"{form} {rounds[form][-1]:.3f} s" for form in FORMS), flush=True)
    rows = []
    for form in FORMS:
        ratios = [mine / its for mine, its in zip(rounds[form], rounds["bf16"], strict=True)]
        rows.append({"form": form, "seconds_per_step": statistics.median(rounds[form]), "ratio": statistics.median(ratios),
                     "ratios": ratios, "rounds": rounds[form]})
        print(f"steps {form}: ratio {rows[-1]['ratio']:.3f}", flush=True)
    return {"tokens_per_step": tokens, "rows": rows}


def measure_loss(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole runs."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMS:
            values = run_values(given, form, batch_size=given.batch, max_steps=given.run_steps, learning_rate=1e-3)
            values["data"] |= {"eval": str(given.data / "e2e.dev.jsonl"), "max_rows": given.rows}
            metrics = tune(parse_run(values | {"output": str(Path(folder) / form)}, base=Path.cwd()),
                           say=lambda line: print(line, file=sys.stderr))
            loss = metrics["metrics"]["loss"]
            rows.append({"form": form, "loss": loss, "base_loss": metrics["base_metrics"]["loss"],
                         "ratio": loss / (rows[0]["loss"] if rows else loss), "steps": metrics["steps"],
                         "tokens": metrics["tokens"],
                         "tokens_per_second": metrics["tokens_per_second"], "peak_memory_bytes": metrics["peak_memory_bytes"]})
            print(f"loss {form}: {rows[-1]}", flush=True)
    return rows


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quantised.json"))
    parser.add_argument("--parts", nargs="+", choices=("load", "steps", "loss"), default=["load", "steps", "loss"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of a round")
    parser.add_argument("--run-steps", type=int, default=150, help="optimizer steps of a whole run")
    parser.add_argument("--rows", type=int, default=4800, help="rows that whole runs read of each file")
    parser.add_argument("--trial", action="store_true", help="few small steps, to see whether all of it runs")
    parser.add_argument("--alone", choices=FORMS, help="load one form in this process; used by the script itself")
    given = parser.parse_args()
    if given.data is None and given.alone is None:
        parser.error("--data is needed")
    given.batch, given.least = (8, 0) if given.trial else (32, LEAST_TOKENS)
    if given.trial:
        given.rounds, given.steps, given.run_steps, given.rows = 2, 1, 2, 24
    return given


def main() -> None:
    given = parsed()
    if given.alone:
        print(json.dumps(load_alone(given.alone)))
        return
    result: dict[str, Any] = {"benchmark": "quantised", "threads": torch.get_num_threads(), "environment": environment()}
    parts = {"load": measure_loading, "steps": lambda: measure_steps(given), "loss": lambda: measure_loss(given)}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    for part in given.parts:
        result[part] = parts[part]()
        given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
