"""Several runs side by side: metrics, sizes, speed, and the settings in which they differ; as data, as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaloom.errors import UsageError
from deltaloom.report import text
from deltaloom.report.facts import read_run
from deltaloom.report.tables import Metric, RunFacts

_SIZES: tuple[tuple[str, str, Callable[[float | None], str], bool | None], ...] = (
    # field of Sizes, label, how it is written, whether higher is better (None: neither)
    ("trainable_parameters", "trainable parameters", text.count, None),
    ("final_parameters", "parameters at the end", text.count, None),
    ("head_parameters", "head parameters", text.count, None),
    ("total_parameters", "model parameters", text.count, None),
    ("delta_bytes", "delta size", text.byte_size, False),
    ("flops_per_token", "FLOP per token", text.quantity, False),
    ("seconds", "training time", text.duration, False),
    ("tokens", "tokens", text.count, None),
    ("tokens_per_second", "tokens per second", text.figure, True),
    ("peak_memory_bytes", "peak memory", text.byte_size, False),
)
_NO_DIFFERENCE = frozenset({"output"})  # two runs cannot share it, so its difference tells nothing


@dataclass(frozen=True)
class ComparisonRow:
    """One line: what a person reads and what a program reads, a cell a run; `best` are the runs with the best value."""

    group: str
    label: str
    cells: tuple[str, ...]
    values: tuple[float | str | None, ...]
    differs: bool
    best: tuple[int, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The runs' names and the lines; groups are `run`, `metrics`, `sizes`, `settings`."""

    runs: tuple[str, ...]
    rows: tuple[ComparisonRow, ...]
    same_settings: int
    missing: tuple[str, ...]

    def group(self, name: str) -> tuple[ComparisonRow, ...]:
        """The lines of one group."""
        return tuple(row for row in self.rows if row.group == name)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: for each group, label -> a value a run, in the order of `runs`."""
        groups: dict[str, Any] = {"runs": list(self.runs)}
        for row in self.rows:
            groups.setdefault(row.group, {})[row.label] = list(row.values)
        return groups | {"same_settings": self.same_settings, "missing": list(self.missing)}

    def text(self) -> str:
        """The table as plain text: `*` marks the best value of a line where one is better."""
        lines: list[tuple[str, ...]] = []
        for group in dict.fromkeys(row.group for row in self.rows):
            lines += [("", *[""] * len(self.runs))] if lines else []
            for row in self.group(group):
                cells = [text.one_line(cell, 60) + (" *" if index in row.best else "") for index, cell in enumerate(row.cells)]
                lines.append((row.label, *cells))
        foot = f"\n{self.same_settings} settings are the same in all runs; * marks the best of a line."
        foot += "".join(f"\nnote: {note}" for note in self.missing)
        return text.table_text(("", *self.runs), lines) + foot


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Read the run folders and compare them.

    Raises:
        UsageError: fewer than two folders, or one does not exist.
    """
    if len(folders) < 2:
        raise UsageError("A comparison needs at least two run folders", got=[str(folder) for folder in folders],
                         hint="For one run, `deltaloom report RUN -o report.html` shows everything.")
    runs = [read_run(folder) for folder in folders]
    return compare(runs, run_names(folders))


def compare(runs: Sequence[RunFacts], names: Sequence[str]) -> Comparison:
    """Compare facts that were read before; `names` are the columns' heads."""
    rows = [_plain("run", "task", [run.task for run in runs]),
            _plain("run", "model", [run.model for run in runs]),
            _plain("run", "methods", [" + ".join(run.methods) for run in runs]),
            _plain("run", "ended", [run.status for run in runs])]
    rows += _metric_rows(runs)
    whole = [run.status != "unfinished" for run in runs]
    for field, label, form, higher in _SIZES:
        values = [getattr(run.sizes, field) for run in runs]
        if any(value is not None for value in values):
            rows.append(_row("sizes", label, values, form, higher, whole=whole))
    settings, same = _setting_rows(runs)
    notes = tuple(f"{name}: {note}" for name, run in zip(names, runs, strict=True) for note in run.missing)
    return Comparison(tuple(names), (*rows, *settings), same, notes)


def run_names(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder that tells them apart: the folder's own, with parents or a number where two agree."""
    parts = [[text.printable(part) for part in folder.resolve().parts if part != folder.anchor] for folder in folders]
    for depth in range(1, max(1, *map(len, parts)) + 1):
        names = ["/".join(own[-depth:]) or "/" for own in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{index + 1}: {own[-1] if own else '/'}" for index, own in enumerate(parts)]


def _metric_rows(runs: Sequence[RunFacts]) -> list[ComparisonRow]:
    tables = [{metric.name: metric for metric in run.metrics} for run in runs]
    rows = []
    for name in dict.fromkeys(name for table in tables for name in table):
        found: list[Metric | None] = [table.get(name) for table in tables]
        higher = next(metric for metric in found if metric).higher_is_better
        values = [metric.value if metric else None for metric in found]
        cells = [metric.text if metric else text.DASH for metric in found]
        rows.append(_row("metrics", name, values, text.measured, higher, cells))
    return rows


def _setting_rows(runs: Sequence[RunFacts]) -> tuple[list[ComparisonRow], int]:
    tables = [{setting.key: setting.value for setting in run.settings} for run in runs]
    rows, same = [], 0
    for key in dict.fromkeys(key for table in tables for key in table):
        row = _plain("settings", key, [table.get(key, "") for table in tables])
        if row.differs and key not in _NO_DIFFERENCE:
            rows.append(row)
        same += not row.differs
    return rows, same


def _plain(group: str, label: str, values: Sequence[str]) -> ComparisonRow:
    return ComparisonRow(group, label, tuple(value or text.DASH for value in values), tuple(value or None for value in values),
                         len(set(values)) > 1)


def _row(group: str, label: str, values: Sequence[float | None], form: Callable[[float | None], str], higher: bool | None,
         cells: Sequence[str] | None = None, whole: Sequence[bool] | None = None) -> ComparisonRow:
    """`whole` tells which runs ended: a part of a run is no contender for the shortest time."""
    contenders = values if whole is None else [value if ended else None for value, ended in zip(values, whole, strict=True)]
    known = [value for value in contenders if value is not None]
    differs = len(set(values)) > 1
    best: tuple[int, ...] = ()
    if higher is not None and len(set(known)) > 1:
        goal = max(known) if higher else min(known)
        best = tuple(index for index, value in enumerate(contenders) if value == goal)
    return ComparisonRow(group, label, tuple(cells or [form(value) for value in values]), tuple(values), differs, best)
