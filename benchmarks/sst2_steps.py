"""Where a training step on SST-2 with MiniLM goes: ours, the peer's, the bare frozen model's, and the frozen products alone.

    python benchmarks/sst2_steps.py --data DIR [--rounds 7] [--threads 2] [--output benchmarks/results/sst2_steps.json]

The same batches of 32 rows (of like lengths, as both sides group them) in turn in every round: forward and backward passes,
without the optimizer. `bare` is the frozen model in bf16 without deltas and without dropout, whose backward pass goes to the
embeddings; `products` are its linears alone, forward and for the gradient of their inputs. No method that keeps the model as it
is gets below `products`; the ratio of `bare` to the peer says what a delta that costs nothing would reach.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from deltaloom.jobs.prepare import parse_parts, prepare
from deltaloom.jobs.runfile import parse_run
from deltaloom.jobs.tune import attached
from deltaloom.models import bundled_path
from deltaloom.train.modes import faster_dropout, training_mode

BATCH, ROWS, CHOSEN = 32, 1600, slice(5, 45, 4)
Step = Callable[[Any], None]


def prepared(data: Path, output: str) -> Any:
    run = parse_run({"model": "bundled:minilm", "task": "sequence-classification", "seed": 0, "output": output,
                     "data": {"train": str(data / "sst2.train.jsonl"), "max_length": 128, "max_rows": ROWS},
                     "deltas": [{"method": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"}],
                     "train": {"epochs": 1, "batch_size": BATCH, "learning_rate": 1e-3, "precision": "bf16"}}, base=Path.cwd())
    return prepare(run, parse_parts(run), say=lambda text: None)


def ours(ready: Any) -> Step:
    tuned = attached(ready)
    modes = ExitStack()  # never left: as in the loop
    modes.enter_context(training_mode(tuned, True))
    modes.enter_context(faster_dropout(tuned))
    trained = [p for p in tuned.parameters() if p.requires_grad]

    def step(batch: Any) -> None:
        total, count = ready.task.loss(tuned, batch)
        (total / count).backward()
        for parameter in trained:
            parameter.grad = None
    return step


def peer() -> Step:
    from peft import LoraConfig, TaskType, get_peft_model

    model = AutoModelForSequenceClassification.from_pretrained(str(bundled_path("minilm")), num_labels=2)
    targets = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
    model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=targets))
    model.train()

    def step(batch: Any) -> None:
        inputs = plain(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        model.zero_grad()
    return step


def bare() -> Step:
    model = AutoModelForSequenceClassification.from_pretrained(str(bundled_path("minilm")), num_labels=2, dtype=torch.bfloat16)
    model.eval().requires_grad_(False)

    def step(batch: Any) -> None:
        inputs = plain(batch)
        embedded = model.get_input_embeddings()(inputs.pop("input_ids")).requires_grad_()
        torch.autograd.grad(model(inputs_embeds=embedded, **inputs).loss, embedded)
    return step


def products() -> Step:
    """The linears of the blocks on as many rows as the padded batch has, in the order of a step."""
    model = AutoModelForSequenceClassification.from_pretrained(str(bundled_path("minilm")), num_labels=2, dtype=torch.bfloat16)
    weights = [(name, module.weight.detach()) for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear) and ".layer." in name]

    @torch.no_grad()
    def step(batch: Any) -> None:
        rows = plain(batch)["input_ids"].numel()
        inputs = {width: torch.ones(rows, width, dtype=torch.bfloat16) for width in {w.shape[1] for _, w in weights}}
        gradients = {width: torch.ones(rows, width, dtype=torch.bfloat16) for width in {w.shape[0] for _, w in weights}}
        for _, weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        for _, weight in reversed(weights):
            gradients[weight.shape[0]] @ weight
    return step


def plain(batch: Any) -> dict[str, torch.Tensor]:
    """What transformers' model takes of one of our batches."""
    return {"input_ids": batch.inputs["input_ids"], "attention_mask": batch.inputs["attention_mask"],
            "labels": batch.labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sst2_steps.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        ready = prepared(given.data, folder)
    order = sorted(range(len(ready.examples)), key=lambda index: ready.examples[index].length)
    batches = [ready.task.collate([ready.examples[i] for i in order[at:at + BATCH]]) for at in range(0, ROWS, BATCH)][CHOSEN]
    tokens = sum(int(plain(batch)["attention_mask"].sum()) for batch in batches)
    sides: dict[str, Step] = {"ours": ours(ready), "peer": peer(), "bare": bare(), "products": products()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(given.rounds + 1):
        for name, step in sides.items():
            began = time.perf_counter()
            for batch in batches:
                step(batch)
            if round_number:  # the first one warms up
                times[name].append((time.perf_counter() - began) / len(batches))
    found = {"benchmark": "sst2_steps", "threads": given.threads, "tokens_per_step": tokens / len(batches),
             "milliseconds": {name: 1e3 * statistics.median(values) for name, values in times.items()},
             "of_peer": {name: statistics.median(mine / its for mine, its in zip(values, times["peer"], strict=True))
                         for name, values in times.items()}, "rounds": times}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: found[key] for key in ("threads", "tokens_per_step", "milliseconds", "of_peer")}, indent=1))


if __name__ == "__main__":
    main()
