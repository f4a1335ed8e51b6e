"""Whether the first token may see a prefix: loss of SmolLM2 on E2E at birth and after a few steps, on the front and everywhere.

    python benchmarks/prefix_first_token.py --data DIR [--output benchmarks/results/prefix_first_token.json]

48 rows to train on (8 a step), 16 others to score, the same for every line; bf16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from deltaloom.data.read import read_rows
from deltaloom.data.settings import DataSettings
from deltaloom.deltas.prefix import Prefix
from deltaloom.evaluate.base import task_named
from deltaloom.models import load_model
from deltaloom.train.feed import ExampleFeed
from deltaloom.train.loop import train
from deltaloom.train.settings import TrainSettings
from deltaloom.tuned import attach

MODEL, STRIDE, ROWS, TRAINED = "bundled:smollm2-135m-instruct", 50, 64, 48
PLACES = {"first two layers": "0-1", "all layers": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/prefix_first_token.json"))
    parser.add_argument("--steps", type=int, default=12)
    given = parser.parse_args()
    loaded = load_model(MODEL, task="causal-lm", dtype=torch.bfloat16)
    settings = DataSettings(train="rows.jsonl", max_length=128, template="Data: {prompt}\nText:")
    kind = task_named("causal-lm")
    rows = read_rows([str(given.data / "e2e.train.jsonl")], settings, Path.cwd(), accepts=kind.formats, numbers=False).rows
    rows = [rows[index] for index in range(0, STRIDE * ROWS, STRIDE)]
    task = kind(settings, kind.prepare(settings, rows, []), loaded.model.config, tokenizer=loaded.tokenizer)
    examples = task.encode(rows)

    def loss(model: torch.nn.Module) -> float:
        return float(task.metrics(task.predict_all(model, examples[TRAINED:]), rows[TRAINED:])["loss"])

    found = {"benchmark": "prefix_first_token", "without": loss(loaded.model), "steps": given.steps, "lines": []}
    print(f"without a prefix: {found['without']:.3f}", flush=True)
    plan = TrainSettings(batch_size=8, max_steps=given.steps, learning_rate=1e-2, precision="bf16", schedule="constant")
    for place, layers in PLACES.items():
        for first_token in ("sees", "alone"):
            tuned = attach(loaded.model, [Prefix(length=16, layers=layers, first_token=first_token)], tokenizer=loaded.tokenizer)
            birth = loss(tuned)
            train(tuned, task, ExampleFeed(examples[:TRAINED], task.collate, plan, seed=0), settings=plan, seed=0)
            found["lines"].append({"place": place, "first_token": first_token, "birth": birth, "after": loss(tuned)})
            tuned.detach()
            print("{place}, first token {first_token}: {birth:.3f} at birth, {after:.3f} after".format(**found["lines"][-1]),
                  flush=True)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
