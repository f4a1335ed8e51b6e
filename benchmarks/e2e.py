"""E2E with SmolLM2-135M: eval loss and time of deltaloom against transformers' Trainer with PEFT, in turn in one run.

    python benchmarks/e2e.py --data DIR [--output benchmarks/results/e2e.json] [--rounds 2]

1,000 rows, one epoch, LoRA rank 8 on all linears, batches of 16, the same tokens on both sides; the peer runs at its best
settings here (bf16 base and adapters, length-grouped). Both losses come from one function. DIR holds e2e.train/dev.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import peers
import torch

import deltaloom
from deltaloom.data.encode import encode_causal
from deltaloom.data.read import read_rows
from deltaloom.data.settings import DataSettings
from deltaloom.models import bundled_path

MODEL = "bundled:smollm2-135m-instruct"
TEMPLATE = "Data: {prompt}\nText:"


def encoded(path: Path, rows: int) -> list[dict[str, list[int]]]:
    """The examples as both sides train on them."""
    from transformers import AutoTokenizer

    settings = DataSettings(train=str(path), template=TEMPLATE, max_rows=rows)
    found = read_rows([str(path)], settings, path.parent, accepts=("prompt-completion",))
    tokenizer = AutoTokenizer.from_pretrained(bundled_path("smollm2-135m-instruct"))
    return [{"input_ids": e.input_ids, "labels": e.labels} for e in encode_causal(found.rows, tokenizer, 256)]


def ours(data: Path, rows: int, held: list[dict[str, Any]], rate: float, seed: int) -> dict[str, float]:
    """One run of the main job; the loss by the common yardstick."""
    from deltaloom.models import load_model

    with tempfile.TemporaryDirectory() as output:
        result = deltaloom.tune({
            "model": MODEL, "task": "causal-lm", "seed": seed, "output": output,
            "data": {"train": str(data / "e2e.train.jsonl"), "template": TEMPLATE, "max_rows": rows, "max_length": 256},
            "deltas": [{"method": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"}],
            "train": {"epochs": 1, "batch_size": 16, "learning_rate": rate, "precision": "bf16"}}, overwrite=True)
        base = load_model(MODEL, task="causal-lm", dtype=torch.bfloat16)
        tuned = deltaloom.load(base.model, output)
        loss = peers.causal_loss(tuned, held)
    return {"loss": loss, "seconds": result["seconds"], "tokens_per_second": result["tokens_per_second"],
            "peak_memory_bytes": result["peak_memory_bytes"]}


def theirs(data: Path, rows: int, held: list[dict[str, Any]], rate: float, seed: int) -> dict[str, float]:
    """One run of the peer."""
    return peers.generate_text(str(bundled_path("smollm2-135m-instruct")), encoded(data / "e2e.train.jsonl", rows), held,
                               rate=rate, seed=seed, epochs=1)


def main() -> None:
    """Run both sides in turn and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/e2e.json"))
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--held", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    held = encoded(given.data / "e2e.dev.jsonl", given.held)
    runs: list[dict[str, Any]] = []
    for number in range(given.rounds):
        for name, run in (("deltaloom", ours), ("peft", theirs)):
            runs.append({"side": name, "round": number, **run(given.data, given.rows, held, given.rate, number)})
            print(json.dumps(runs[-1]), flush=True)
    middle = {name: {key: statistics.median(r[key] for r in runs if r["side"] == name)
                     for key in ("loss", "seconds", "tokens_per_second")} for name in ("deltaloom", "peft")}
    summary = {**middle, "speed_ratio": middle["peft"]["seconds"] / middle["deltaloom"]["seconds"],
               "loss_difference": middle["deltaloom"]["loss"] - middle["peft"]["loss"]}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"benchmark": "e2e", "rows": given.rows, "summary": summary, "runs": runs}
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
