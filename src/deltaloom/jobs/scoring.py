"""Scores of a model on rows: metrics, intervals, tables, what to show of single rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from deltaloom.data.encode import Example
from deltaloom.data.rows import Row
from deltaloom.evaluate.base import Prediction, Spread, Task

SHOWN = 8           # rows in the report before and after
SHOWN_WRITTEN = 3   # fewer where the model has to write them
SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Scores:
    """Metrics of one model on rows, and its predictions."""

    metrics: dict[str, float]
    predictions: list[Prediction]


def score(task: Task, model: nn.Module, examples: Sequence[Example], rows: Sequence[Row], spread: Spread | None = None) -> Scores:
    """Predictions for all examples and their metrics; empty without rows. `spread` as in `Task.predict_all`."""
    if not rows:
        return Scores({}, [])
    predictions = task.predict_all(model, examples, spread=spread)
    return Scores(task.metrics(predictions, rows), predictions)


def majority(rows: Sequence[Row], task: Task) -> dict[str, float]:
    """The accuracy of always answering the commonest label; empty for tasks without classes."""
    if task.targets.labels is None or not rows or task.primary != "accuracy":
        return {}
    counts = Counter(row.target for row in rows)
    total = sum(counts.values())
    return {"accuracy": max(counts.values()) / total} if len(counts) <= len(task.targets.labels) else {}


def class_rows(task: Task, predictions: Sequence[Prediction], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The per-class table under the key that the report reads (`label`)."""
    tables = task.tables(predictions, rows) if len(rows) else {}
    first = next(iter(tables.values()), [])
    return [{"label": row.get("class", row.get("label")), **{k: v for k, v in row.items() if k not in ("class", "label")}}
            for row in first]


def answers(task: Task, model: nn.Module, rows: Sequence[Row], examples: Sequence[Example],
            write: Callable[[nn.Module, Sequence[Any]], list[str]] | None) -> list[str]:
    """What the model answers to rows, as text: what `write` makes of prompts, or its prediction in words."""
    if not rows:
        return []
    if not task.generates or write is None:
        return [task.shown(prediction) for prediction in task.predict_all(model, examples)]
    training = model.training
    model.eval()
    try:
        return write(model, task.prompts(rows))
    finally:
        model.train(training)


def shown_rows(task: Task, rows: Sequence[Row]) -> range:
    """The rows of the report's before and after."""
    return range(min(len(rows), SHOWN_WRITTEN if task.generates else SHOWN))
