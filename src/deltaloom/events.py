"""Plain records of what happened in a run, and the sinks that receive them.

An event is a frozen dataclass; a sink is a function from an event to nothing. The loop, controllers and jobs emit
events and know nothing of files, terminals or reports.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened; `time` is seconds since the epoch."""

    time: float = field(default_factory=time.time)

    def record(self) -> dict[str, Any]:
        """A JSON-ready mapping: the kind and every field."""
        return {"event": type(self).__name__, **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class DataRead(Event):
    """The facts of the data: rows, labels, lengths, truncations, duplicates, overlap, a few first rows; see `data.facts`."""

    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Attached(Event):
    """The table of sites: one row a (method, pattern) with `method`, `target`, `sites`, `parameters`, `examples`."""

    table: list[dict[str, Any]]
    delta_parameters: int
    head_parameters: int
    total_parameters: int


@dataclass(frozen=True, kw_only=True)
class Sampled(Event):
    """One evaluation row before and after tuning, as text: what a person compares in the report."""

    row: int
    input: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """Training begins (or goes on at `step`); sizes in parameters and optimizer steps."""

    step: int
    total_steps: int | None
    trainable_parameters: int
    total_parameters: int


@dataclass(frozen=True, kw_only=True)
class Step(Event):
    """One optimizer step. `loss` per token or row in nats, `tokens` real ones in this step, `padding` a share."""

    step: int
    epoch: float
    loss: float
    penalty: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    padding: float
    seconds: float
    memory_bytes: int = 0
    floor_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """Metrics on the evaluation rows at a step; `best` if it is the best so far."""

    step: int
    metrics: dict[str, float]
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class Saved(Event):
    """A checkpoint or delta was written completely."""

    step: int
    path: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something a user should know; `count` how often it happened. Shown in the report."""

    kind: str
    message: str
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class RankChanged(Event):
    """A controller decided which components stay: for each group of layers the ranks of its rows, and their mean importance.

    `rows` says what a row of a group is: "layer" or "frequency". `ranks` and `importance` hold, for each group, one number a
    row: its rank, and the mean importance score of its components. `parameters` are those of the kept components, `budget` those
    that were allowed. `residual`: the largest relative deviation ||U^T U - I|| / sqrt(r) over the groups; 0 where none is kept
    orthonormal.
    """

    step: int
    rows: str
    ranks: dict[str, list[int]]
    importance: dict[str, list[float]]
    parameters: int
    budget: int
    residual: float


@dataclass(frozen=True, kw_only=True)
class Routed(Event):
    """How held-out rows share the entries of a choice by the input text.

    `groups`: mappings with `by` ("all", "label" or "file"), `name`, `rows`, and `shares`, the mean weight of each entry.
    """

    step: int
    rows: int
    groups: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Acted(Event):
    """Somebody (a strategy, early stop, a signal) changed the course of the run, with the reason."""

    step: int
    action: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Privacy(Event):
    """What a party's guards are worth: `rows` of the account (see `private.account`) at `delta`, and what is not promised.

    `promised`: whether any guard draws noise. `unpromised`: what leaves the party without any promise, in sentences.
    """

    promised: bool
    delta: float
    rows: list[dict[str, Any]]
    unpromised: list[str]


@dataclass(frozen=True, kw_only=True)
class Finished(Event):
    """Training ended: why (`completed`, `max_time`, `early_stop`, `interrupted`), seconds of the loop alone, tokens."""

    step: int
    reason: str
    seconds: float
    tokens: int


Sink = Callable[[Event], None]


class Emitter:
    """Sends each event to every sink, in order."""

    def __init__(self, sinks: Iterable[Sink] = ()) -> None:
        self.sinks = list(sinks)

    def __call__(self, event: Event) -> None:
        """Send one event."""
        for sink in self.sinks:
            sink(event)


class JsonLines:
    """A sink that appends one JSON object a line; a line is complete or absent after a crash (a cut line is dropped on open)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            drop_cut_line(path)
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")  # a lone surrogate becomes its JSON escape

    def __call__(self, event: Event) -> None:
        """Append one event."""
        self._file.write(json.dumps(finite(event.record()), ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; the sink takes no more events."""
        self._file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines event file; a last line that a crash cut is left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # not splitlines: texts may hold U+2028
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return [record for record in records if isinstance(record, dict) and "event" in record]


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None (JSON has no word for them)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def drop_cut_line(path: Path) -> None:
    """Remove a last line that a crash left without its end."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
