"""Who is used when: what choices by the input text make of held-out rows, in all, by label, and by the file they are from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deltaloom.data.batches import micro_batches
from deltaloom.data.encode import Example
from deltaloom.data.rows import Row
from deltaloom.evaluate.base import Task
from deltaloom.events import Emitter, Routed
from deltaloom.train.feed import MICRO_TOKENS
from deltaloom.train.modes import training_mode
from deltaloom.tuned import Tuned

MOST = 2000   # rows that are looked at
GROUPS = 20   # labels or files that are told apart, the most frequent ones


def tell_usage(task: Task, model: nn.Module, tuned: Tuned, examples: Sequence[Example], rows: Sequence[Row], step: int,
               emit: Emitter) -> None:
    """Emit for each choice by the input text how held-out rows share its entries; `model` predicts, with `tuned` inside."""
    readers = tuned.readers()
    if not readers or not examples:
        return
    chosen = list(examples[:MOST])
    weights: list[dict[int, torch.Tensor]] = [{} for _ in readers]
    with torch.no_grad(), training_mode(tuned, False):
        for indices in micro_batches(range(len(chosen)), [example.length for example in chosen], MICRO_TOKENS):
            task.predict(model, task.collate([chosen[index] for index in indices]).to(tuned.device))
            for found, reader in zip(weights, readers, strict=True):
                found.update(zip(indices, reader.used().cpu(), strict=True))
    labels = [row.target for row in rows[:len(chosen)]] if task.targets.labels is not None else []
    files = [row.where.rpartition(":")[0] for row in rows[:len(chosen)]]
    for found in weights:
        used = torch.stack([found[index] for index in range(len(chosen))])
        groups = [_group("all", "", used), *_by("label", labels, used)]
        groups += _by("file", files, used) if len(set(files)) > 1 else []
        emit(Routed(step=step, rows=len(chosen), groups=groups))


def _by(kind: str, names: Sequence[str], used: torch.Tensor) -> list[dict[str, Any]]:
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    frequent = sorted(counts, key=lambda name: -counts[name])[:GROUPS]
    return [_group(kind, name, used[[index for index, own in enumerate(names) if own == name]]) for name in frequent]


def _group(kind: str, name: str, used: torch.Tensor) -> dict[str, Any]:
    return {"by": kind, "name": name, "rows": len(used), "shares": used.double().mean(0).tolist()}
