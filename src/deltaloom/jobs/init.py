"""A starter run file for a task."""

from __future__ import annotations

from pathlib import Path

from deltaloom.errors import RefusedError, SettingsError, did_you_mean
from deltaloom.registry import names_in

TEXT = """\
# A run of deltaloom. Look before: deltaloom plan {name}      Train: deltaloom tune {name}
model: {model}
task: {task}
data:
  train: {train}
  eval_fraction: 0.1          # or eval: dev.jsonl
  format: auto                # what was detected is printed
  max_length: {length}
deltas:                       # one or several, composed in this order; `deltaloom methods` lists them
  - {{method: lora, rank: 8, alpha: 16, targets: all-linear}}
train:
  epochs: {epochs}
  batch_size: {batch}
  learning_rate: {rate}
  schedule: linear
  warmup: 0.05
  precision: auto
seed: 0
output: runs/{stem}
"""
# rates: for a low-rank delta the best rate is about ten times that of full tuning
GENERATES = {"length": 512, "epochs": 1, "batch": 16, "rate": "1.0e-3"}
CLASSIFIES = {"length": 128, "epochs": 3, "batch": 32, "rate": "1.0e-3"}


def write_starter(path: Path, *, task: str, model: str | None, train: str, overwrite: bool = False) -> Path:
    """Write a commented run file.

    Raises:
        SettingsError: unknown task. RefusedError: the file exists.
    """
    tasks = names_in("deltaloom.evaluate", skip=("base", "metrics"))
    if task not in tasks:
        raise SettingsError("unknown task", got=task, legal=tasks, hint=did_you_mean(task, tasks))
    if path.exists() and not overwrite:
        raise RefusedError("the file exists", got=str(path), hint="Choose another name or pass --overwrite.")
    generates = task.endswith("-lm")
    chosen = model or ("bundled:smollm2-135m-instruct" if task == "causal-lm" else "bundled:minilm" if not generates else "")
    if not chosen:
        raise SettingsError(f"no bundled model does {task}", hint="Name one with --model: a folder or a hub id.")
    values = GENERATES if generates else CLASSIFIES
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TEXT.format(name=path.name, stem=path.stem, model=chosen, task=task, train=train, **values), encoding="utf-8")
    return path
