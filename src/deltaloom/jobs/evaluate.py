"""Metrics of a run, a delta on a model, or a model on files of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deltaloom.data.labels import check_known
from deltaloom.data.read import read_rows
from deltaloom.events import finite
from deltaloom.jobs.opening import open_source
from deltaloom.jobs.scoring import class_rows, score
from deltaloom.report.text import figure, table_text


def evaluate(source: str, data: Sequence[Path], *, deltas: Sequence[Path] = (), weights: str | None = None,
             task: str | None = None, overrides: Sequence[str] = (), say: Callable[[str], None] = print) -> dict[str, Any]:
    """Metrics with 95% bootstrap intervals over rows, per class where there are classes.

    Raises:
        DataError: rows that cannot be used, or labels that the model does not know.
    """
    opened = open_source(source, deltas=deltas, weights=weights, task=task, overrides=overrides)
    bound = opened.task
    found = read_rows([str(path) for path in data], bound.settings, Path.cwd(), accepts=bound.formats, numbers=bound.numbers)
    if bound.targets.labels is not None:
        check_known(found.rows, bound.targets.labels, "the trained model")
    say(f"Data: {len(found)} rows; {found.detected}")
    scores = score(bound, opened.model, bound.encode(found.rows), found.rows)
    intervals = bound.intervals(scores.predictions, found.rows)
    classes = class_rows(bound, scores.predictions, found.rows)
    say(table_text(("metric", "value", "95% interval"),
                   [(name, figure(value), f"{figure(intervals[name][0])} to {figure(intervals[name][1])}")
                    for name, value in scores.metrics.items()]))
    if classes:
        columns = list(classes[0])
        say(table_text(columns, [[row[c] if isinstance(row[c], str) else figure(row[c]) for c in columns] for row in classes]))
    return finite({"metrics": scores.metrics, "rows": len(found), "intervals": intervals, "per_class": classes})
