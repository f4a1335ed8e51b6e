"""What was measured of the methods: learning rates and scales, and which method a budget buys. `rates.yaml` is the table.

Whoever needs a default rate asks here: run files that leave it out, the starter file, advice. Read without torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

TABLE = Path(__file__).parent / "rates.yaml"
SIZES = ("rank", "alpha", "length")  # settings that say how large a delta is, not of which kind


@dataclass(frozen=True)
class Rate:
    """A measured rate; `size` in units of rank 1 on all linears of the blocks, `on` says what it was measured on.

    `run`: (candidate, budget) of its raw figures, where they are the evidence's.
    """

    delta: Mapping[str, Any]
    size: float
    generates: bool
    on: str
    rate: float
    tried: tuple[float, ...]
    page: str
    scale: float | None = None
    run: tuple[str, str] | None = None

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.delta["method"])

    @property
    def border(self) -> str:
        """How far the trials went beyond the best: empty if to both sides."""
        if len(self.tried) == 1:
            return "the only one that was tried"
        if self.rate == min(self.tried):
            return "the lowest that was tried, so lower ones may be better"
        return "the highest that was tried, so higher ones may be better" if self.rate == max(self.tried) else ""


@dataclass(frozen=True)
class Published:
    """A rate that others published for a method that has none of ours."""

    method: str
    rate: float
    source: str


@dataclass(frozen=True)
class Choice:
    """What a budget below `below` buys (no limit: None), for tasks whose answer is a text or is not (None: both)."""

    delta: Mapping[str, Any]
    fit: Literal["rank", "sites"]
    most: float | None
    below: float | None
    generates: bool | None
    reason: str
    page: str


@dataclass(frozen=True)
class Table:
    """The whole table; `otherwise` is the rate of what has no row."""

    otherwise: float
    rates: tuple[Rate, ...]
    published: tuple[Published, ...]
    choices: tuple[Choice, ...]


@lru_cache
def table() -> Table:
    """The table as its file has it."""
    values = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    rates = []
    for row in values["rates"]:
        place, run = values["where"][row["where"]], row.get("run")
        rates.append(Rate(row["delta"], row["size"], place["generates"], place["text"], row["rate"], tuple(row["tried"]),
                          place["page"], row.get("scale"), tuple(run) if run else None))
    choices = [Choice(row["delta"], row["fit"], row.get("most"), row.get("below"), row.get("generates"), row["reason"],
                      row["page"]) for row in values["choices"]]
    return Table(values["otherwise"], tuple(rates), tuple(Published(**row) for row in values["published"]), tuple(choices))


def measured_rate(entry: Mapping[str, Any], *, generates: bool, size: float | None = None) -> Rate | None:
    """The row that comes nearest to an entry of `deltas`, whose settings may all be stated; None for a method without rows.

    First by the kind of task, then by settings that differ, then by size: `size` in the table's unit if it is known, else the
    entry's rank.
    """
    rows = [row for row in table().rates if row.method == entry.get("method")]
    wanted = size or entry.get("rank")

    def distance(row: Rate) -> tuple[bool, int, float]:
        other = sum(entry.get(key, value) != value for key, value in row.delta.items() if key not in SIZES)
        return row.generates != generates, other, abs(math.log(wanted / row.size)) if wanted else 0.0

    return min(rows, key=distance, default=None)


def published_rate(entry: Mapping[str, Any]) -> Published | None:
    """What others published for a method without a row of ours."""
    return next((row for row in table().published if row.method == entry.get("method")), None)


def default_rate(entries: Sequence[Mapping[str, Any]], *, generates: bool) -> float:
    """The learning rate of a run file that leaves it out: of several methods the lowest, because combinations were not measured.

    Methods without a row count with the table's `otherwise`.
    """
    found = [measured_rate(entry, generates=generates) for entry in entries]
    return min((row.rate if row else table().otherwise for row in found), default=table().otherwise)


def choice_for(size: float | None, *, generates: bool) -> Choice:
    """What a budget of that size buys; None: the choice where nothing limits it."""
    fitting = [choice for choice in table().choices if choice.generates in (None, generates)]
    if size is None:
        return fitting[-1]
    return next((choice for choice in fitting if choice.below is None or size < choice.below), fitting[-1])
