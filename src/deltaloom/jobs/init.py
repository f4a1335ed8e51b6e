"""A starter run file for a task."""

from __future__ import annotations

import math
from pathlib import Path

import yaml

from deltaloom.deltas.measured import choice_for, default_rate
from deltaloom.errors import RefusedError, SettingsError, did_you_mean
from deltaloom.files import write_atomic
from deltaloom.registry import names_in

TEXT = """\
# A run of deltaloom. Look before: deltaloom plan {name}      Train: deltaloom tune {name}
# What is left out is proposed, with reasons, by: deltaloom plan {name} --advise
model: {model}
task: {task}
data:
  train: {train}
  eval_fraction: 0.1          # or eval: dev.jsonl
  format: auto                # what was detected is printed
  max_length: {length}
deltas:                       # one or several, composed in this order; `deltaloom methods` lists them
  - {delta}
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
BUNDLED = {"causal-lm": "bundled:smollm2-135m-instruct"} | dict.fromkeys(
    ("sequence-classification", "token-classification", "regression"), "bundled:minilm")
GENERATES = {"length": 512, "epochs": 1, "batch": 16}
CLASSIFIES = {"length": 128, "epochs": 3, "batch": 32}


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
    chosen = model or BUNDLED.get(task)
    if chosen is None:
        raise SettingsError(f"no bundled model does {task}", hint="Name one with --model: a folder or a hub id.")
    generates = task.endswith("-lm")
    delta = {**choice_for(None, generates=generates).delta, "targets": "all-linear"}
    text = TEXT.format(name=path.name, stem=path.stem, model=_quoted(chosen), task=task, train=_quoted(train),
                       delta=yaml.safe_dump(delta, sort_keys=False, default_flow_style=True, width=math.inf).strip(),
                       rate=f"{default_rate([delta], generates=generates):.1e}", **(GENERATES if generates else CLASSIFIES))
    return write_atomic(path, text)


def _quoted(text: str) -> str:
    """The text as a YAML value, in quotes where it needs them."""
    return yaml.safe_dump(text, allow_unicode=True, width=math.inf).split("\n", 1)[0]
