"""Run folders as the jobs write them, made from the real event classes; small knobs for the tests."""

import json
import math
import random
from pathlib import Path

import yaml

from deltaloom import events

STEPS = 120


def classification_run(
    folder: Path, *, rate: float = 1e-3, rank: int = 8, seed: int = 0, steps: int = STEPS, finished: bool = True
) -> Path:
    folder.mkdir(parents=True)
    sink = events.JsonLines(folder / "events.jsonl")
    for event in run_events(rate=rate, rank=rank, seed=seed, steps=steps, finished=finished):
        sink(event)
    sink.close()
    (folder / "run.yaml").write_text(yaml.safe_dump(run_file(rate, rank, folder.name), sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    if finished:
        (folder / "metrics.json").write_text(json.dumps(metrics(rate, rank)))
        save_record(folder)
    return folder


def run_file(rate: float, rank: int, name: str) -> dict:
    return {
        "model": "bundled:minilm",
        "task": "sequence-classification",
        "data": {"train": "train.jsonl", "eval": "dev.jsonl", "format": "auto", "max_length": 128},
        "deltas": [{"method": "lora", "rank": rank, "alpha": 16, "targets": ["query", "value"]}],
        "train": {"epochs": 2, "optimizer": "adamw", "batch_size": 16, "learning_rate": rate, "schedule": "linear"},
        "seed": 0,
        "output": f"runs/{name}",
        "origins": {
            "model": "file",
            "task": "file",
            "data.train": "file",
            "data.eval": "file",
            "data.format": "default",
            "data.max_length": "default",
            "deltas": "file",
            "train.learning_rate": "flag",
            "train.epochs": "file",
            "train.batch_size": "default",
            "seed": "default",
            "output": "file",
        },
    }


def metrics(rate: float = 1e-3, rank: int = 8) -> dict:
    gain = 0.33 if rate < 5e-3 else 0.21
    return {
        "run": "sst2",
        "task": "sequence-classification",
        "model": "bundled:minilm",
        "methods": [{"method": "lora", "rank": rank, "alpha": 16, "targets": ["query", "value"]}],
        "metrics": {"accuracy": 0.5092 + gain, "macro_f1": 0.5 + gain, "loss": 0.4012},
        "base_metrics": {"accuracy": 0.5092, "macro_f1": 0.3374, "loss": 0.7114},
        "trainable_parameters": 73728 * rank // 8,
        "final_parameters": 73728 * rank // 8,
        "head_parameters": 770,
        "total_parameters": 22713986,
        "delta_bytes": 302112 * rank // 8,
        "flops_per_token": 8.58e7,
        "seconds": 74.21,
        "tokens": 214310,
        "tokens_per_second": 2887.9,
        "peak_memory_bytes": 412876800,
        "primary": {"name": "accuracy", "higher_is_better": True},
        "majority": {"accuracy": 0.5092, "macro_f1": 0.3374},
        "intervals": {"accuracy": [0.8131, 0.8651]},
        "per_class": [
            {"label": "negative", "precision": 0.83, "recall": 0.85, "f1": 0.8399, "support": 428, "interval": [0.81, 0.87]},
            {"label": "positive", "precision": 0.852, "recall": 0.828, "f1": 0.8398, "support": 444},
        ],
        "warnings": [],
    }


ENVIRONMENT = {
    "python": "3.11.2",
    "platform": "Linux x86_64",
    "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
    "cpu": {"cores": 2, "name": "A processor"},
    "hf_token": "hf_abcdefghijklmnopqrstuvwx",
}


SHAPES = {"q": (384, 384), "k": (384, 384), "v": (384, 384), "o": (384, 384), "up": (1536, 384), "down": (384, 1536)}


def rank_change(
    step: int, progress: float, *, rank: int = 8, rows: str = "layer", layers: int = 6, groups: tuple[str, ...] = tuple(SHAPES)
) -> events.RankChanged:
    """What a controller could decide: ranks go where the importance is, within a budget that falls by a cubic schedule."""
    chance = random.Random(rows)
    scores, ranks, cost = {}, {}, {}
    allowed = round(rank * (1.5 - 0.9 * (1 - (1 - progress) ** 3)) * layers * len(groups))
    for place, name in enumerate(groups):
        fall = 0.9 * place / len(groups) + (2.2 if rows == "frequency" else 0.6)
        peak = 0 if rows == "frequency" else 0.7
        wave = [0.3 * math.sin(6 * progress + 7 * chance.random()) for _ in range(layers)]
        scores[name] = [
            1e-3 * math.exp(-3 * progress + wave[row] - fall * abs(row / layers - peak)) for row in range(layers)
        ]
        cost[name] = sum(SHAPES.get(name.split()[0], (384, 384)))
    whole = sum(score**0.7 for row in scores.values() for score in row)
    for name, row in scores.items():
        ranks[name] = [max(0, min(round(2 * rank), round(allowed * score**0.7 / whole * (1 + progress) - progress * rank / 2)))
                       for score in row]
    kept = sum(sum(row) * cost[name] for name, row in ranks.items())
    return events.RankChanged(step=step, rows=rows, ranks=ranks, importance=scores, parameters=kept, budget=round(kept * 1.04),
                              residual=0.02 + 0.3 * math.exp(-6 * progress) * (1 + 0.1 * chance.random()))


DEPTH = [
    {"role": role, "shape": list(shape), "method": 0, "layers": 6, "rho": 0.17 + 0.11 * place,
     "ranks": [4, 8, 8, 6, 5, 2 + place], **({"residual": 0.0031} if role != "down" else {})}
    for place, (role, shape) in enumerate(SHAPES.items())
]


def save_record(folder: Path, **changes: object) -> None:
    """The record of a saved delta as far as a report reads it."""
    (folder / "delta").mkdir(exist_ok=True)
    methods = [{"settings": {"method": "lora"}, "sites": []}]
    record = {"format": "deltaloom-delta", "version": 1, "methods": methods, "groups": DEPTH}
    (folder / "delta" / "delta.json").write_text(json.dumps(record | changes))


def run_events(
    *, rate: float = 1e-3, rank: int = 8, seed: int = 0, steps: int = STEPS, finished: bool = True
) -> list[events.Event]:
    """One of every kind at least."""
    chance = random.Random(seed)
    happened: list[events.Event] = [
        events.DataRead(
            facts={
                "rows": 3420,
                "eval_rows": 872,
                "format": "text-label",
                "labels": {"positive": 1804, "negative": 1616},
                "eval_labels": {"positive": 444, "negative": 428},
                "label_order": ["negative", "positive"],
                "lengths": {"p0": 3.0, "p50": 23.0, "p90": 54.0, "p100": 131.0, "mean": 26.71828},
                "vocabulary": {"size": 8123, "bits": "A" * 4000},
                "warnings": ["12 training rows occur twice", "1 of 872 evaluation rows has the input of a training row"],
                "truncated_rows": 3,
                "truncated_tokens": 17,
                "duplicates": 12,
                "overlap": 1,
                "first_rows": [
                    {
                        "where": "train.jsonl:1",
                        "tokens": 9,
                        "segments": [{"text": "a gripping, quietly devastating film", "learned": False}],
                        "target": "positive (class 1)",
                    },
                    {
                        "where": "train.jsonl:2",
                        "tokens": 14,
                        "segments": [
                            {"text": "Review: dull\nVerdict: ", "learned": False},
                            {"text": "negative<eos>", "learned": True},
                        ],
                        "target": "",
                    },
                ],
            }
        ),
        events.Attached(
            table=[
                {
                    "method": "lora",
                    "target": ["query", "value"],
                    "sites": 12,
                    "parameters": 73728,
                    "examples": ["encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self.value"],
                }
            ],
            delta_parameters=73728,
            head_parameters=770,
            total_parameters=22713986,
        ),
        events.Started(step=0, total_steps=steps, trainable_parameters=74498, total_parameters=22713986),
        events.Warned(kind="truncated", message="3 rows were longer than data.max_length=128 and were cut at the end", count=3),
        events.Warned(kind="duplicate", message="12 training rows occur twice", count=12),
    ]
    for step in range(1, steps + 1):
        progress = step / steps
        happened.append(
            events.Step(
                step=step,
                epoch=2 * progress,
                loss=0.36 + 0.36 * math.exp(-6 * progress) + chance.gauss(0, 0.05),
                penalty=0.0,
                learning_rate=rate * (1 - progress),
                gradient_norm=1 + chance.random(),
                tokens=1785 + chance.randrange(200),
                padding=0.04 + 0.03 * chance.random(),
                seconds=0.6 + 0.05 * chance.random(),
                memory_bytes=900_000_000 + 1_000_000 * step,
                floor_share=0.61 + 0.02 * chance.random(),
            )
        )
        if step % max(1, steps // 6) == 0:
            happened.append(
                events.Evaluated(
                    step=step,
                    best=step == steps,
                    metrics={
                        "accuracy": 0.51 + 0.33 * (1 - math.exp(-4 * progress)),
                        "loss": 0.4 + 0.31 * math.exp(-5 * progress),
                    },
                )
            )
            happened.append(rank_change(step, progress, rank=rank))
    happened.append(
        events.Acted(step=steps - 1, action="early stop considered", reason="accuracy has not risen for 2 evaluations")
    )
    happened.append(events.Saved(step=steps, path="/home/someone/secret-place/runs/sst2/checkpoints/step-120", bytes=302112))
    if finished:
        happened += [
            events.Privacy(
                promised=True,
                delta=1e-6,
                rows=[
                    {"crossing": "hidden states", "scope": scope, "unit": "text", "releases": 12, "mu": mu, "epsilon": 4}
                    for scope, mu in (("run", 1.5), ("folder", 2.5))
                ],
                unpromised=["labels: they are sent to the owner as they are"],
            ),
            events.Sampled(
                row=3, input="it 's slow -- very , very slow .", reference="negative", before="positive", after="negative"
            ),
            events.Sampled(
                row=17,
                input="although laced with humor and a few fanciful touches , the film is a refreshingly serious look "
                "at young women .",
                reference="positive",
                before="positive",
                after="positive",
            ),
            events.Finished(step=steps, reason="completed", seconds=74.21, tokens=214310),
            events.Routed(step=steps, rows=872, groups=[{"by": "all", "name": "", "rows": 872, "shares": [0.71, 0.29]},
                                                        {"by": "label", "name": "mixed <b>", "rows": 3, "shares": [0.0, 1.0]}]),
        ]
    return happened
