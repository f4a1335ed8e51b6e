"""SST-2 with MiniLM: accuracy and time of deltaloom against transformers' Trainer with PEFT, in turn in one run.

    python benchmarks/sst2.py --data DIR [--output benchmarks/results/sst2.json] [--rates ...] [--seeds 3]

LoRA rank 8 on all linears of the blocks, 2 epochs, batches of 32, bf16 (the peer: bf16 autocast). Each side takes the best of
the same three rates by seed 0, then runs the other seeds at it. DIR holds sst2.train.jsonl and sst2.dev.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import peers

import deltaloom
from deltaloom.models import bundled_path

LABELS = ["negative", "positive"]


def ours(folder: Path, rate: float, seed: int, epochs: float, limit: int | None) -> dict[str, float]:
    """One run of the main job; accuracy of the last step's delta, as the peer's."""
    with tempfile.TemporaryDirectory() as output:
        result = deltaloom.tune({
            "model": "bundled:minilm", "task": "sequence-classification", "seed": seed, "output": output,
            "data": {"train": str(folder / "sst2.train.jsonl"), "eval": str(folder / "sst2.dev.jsonl"), "max_length": 128,
                     **({"max_rows": limit} if limit else {})},
            "deltas": [{"method": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"}],
            "train": {"epochs": epochs, "batch_size": 32, "learning_rate": rate, "precision": "bf16", "eval_every": 0.99}},
            overwrite=True)
    return {"accuracy": result["metrics"]["accuracy"], "seconds": result["seconds"],
            "tokens_per_second": result["tokens_per_second"]}


def theirs(folder: Path, rate: float, seed: int, epochs: float, limit: int | None) -> dict[str, float]:
    """One run of the peer."""
    rows = {part: [json.loads(line) for line in (folder / f"sst2.{part}.jsonl").read_text().splitlines()][:limit]
            for part in ("train", "dev")}
    return peers.classify(str(bundled_path("minilm")), rows["train"], rows["dev"], LABELS, rate=rate, seed=seed, epochs=epochs)


def main() -> None:
    """Run both sides in turn and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sst2.json"))
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--limit", type=int, default=None, help="rows, for a trial of the script")
    given = parser.parse_args()
    sides = {"deltaloom": ours, "peft": theirs}
    runs: list[dict[str, Any]] = []

    def both(rates: dict[str, float], seed: int) -> None:
        for name, run in sides.items():
            found = {"side": name, "rate": rates[name], "seed": seed,
                     **run(given.data, rates[name], seed, given.epochs, given.limit)}
            runs.append(found)
            print(json.dumps(found), flush=True)
            write(given.output, runs)

    for rate in given.rates:
        both(dict.fromkeys(sides, rate), 0)
    best = {name: max((r for r in runs if r["side"] == name), key=lambda r: r["accuracy"])["rate"] for name in sides}
    for seed in range(1, given.seeds):
        both(best, seed)
    print(json.dumps(write(given.output, runs)["summary"], indent=1))


def write(path: Path, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """All runs and their summary."""
    summary: dict[str, Any] = {}
    for name in {run["side"] for run in runs}:
        mine = [run for run in runs if run["side"] == name]
        rate = max(mine, key=lambda run: (sum(r["rate"] == run["rate"] for r in mine), run["accuracy"]))["rate"]
        chosen = [run["accuracy"] for run in mine if run["rate"] == rate]
        summary[name] = {"rate": rate, "seeds": len(chosen), "accuracy": statistics.mean(chosen),
                         "seconds": statistics.median(run["seconds"] for run in mine),
                         "tokens_per_second": statistics.median(run["tokens_per_second"] for run in mine)}
    if len(summary) == 2:
        summary["time_ratio"] = summary["deltaloom"]["seconds"] / summary["peft"]["seconds"]
        summary["accuracy_difference"] = summary["deltaloom"]["accuracy"] - summary["peft"]["accuracy"]
    result = {"benchmark": "sst2", "summary": summary, "runs": runs}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
