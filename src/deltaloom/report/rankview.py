"""The drawings of ranks while training: heat maps of ranks and of importance, and curves of what was kept."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from markupsafe import Markup

from deltaloom.report.charts import Chart, Series, line_chart
from deltaloom.report.heat import Heat, heat_map, log_heat, whole_heat
from deltaloom.report.svg import shortened
from deltaloom.report.tables import RankGroup, RankHistory
from deltaloom.report.text import DASH, count, figure

MOST_BYTES = 200_000                     # of all maps of a run
# Most columns, and whether lines have hover texts: the first that fits is taken.
_DETAIL = ((80, True), (56, True), (40, True), (40, False), (28, False), (20, False), (14, False), (10, False), (5, False))
Table = Sequence[Sequence[float | None]]  # [change][row]


@dataclass(frozen=True)
class RankView:
    """One controller's drawings, the legends of their tones, and how to read them; `hover`: lines tell their numbers."""

    title: str
    reading: str
    hover: bool
    ranks: list[Chart]
    importance: list[Chart]
    rank_legend: list[tuple[int | None, str]]
    importance_legend: list[tuple[int | None, str]]
    curves: list[Chart]


def rank_views(histories: Sequence[RankHistory]) -> list[RankView]:
    """A view of each history; together their maps stay within `MOST_BYTES`, at the price of columns and hover texts."""
    shown = [history for history in histories if history.groups]
    views: list[RankView] = []
    for most, hover in _DETAIL:
        views = [_view(history, most, hover, len(shown) > 1) for history in shown]
        if sum(len(chart.svg) for view in views for chart in (*view.ranks, *view.importance)) <= MOST_BYTES:
            break
    return views


def _view(history: RankHistory, most: int, hover: bool, several: bool) -> RankView:
    rank_heat = whole_heat(rank for group in history.groups for row in group.ranks for rank in row if rank is not None)
    shares = _relative(history)
    share_heat = log_heat((value for table in shares for row in table for value in row if value is not None), "\u00d7")
    picked = columns(history.steps, most)
    return RankView(
        title=", ".join(shortened(group.name, 40) for group in history.groups[:6]) if several else "",
        reading=_reading(history.rows), hover=hover,
        ranks=[_ranks(history, group, picked, rank_heat, hover) for group in history.groups],
        importance=[_importance(history, group, table, picked, share_heat, hover)
                    for group, table in zip(history.groups, shares, strict=True) if any(map(any, table))],
        rank_legend=rank_heat.legend, importance_legend=share_heat.legend, curves=_curves(history))


def columns(steps: Sequence[int], most: int) -> list[int]:
    """The change that each column shows: the last one before its right end, with columns evenly from first to last step.

    As many columns as keep the shortest distance between two changes apart, but at most `most`.
    """
    if len(steps) < 2:
        return [0] * len(steps)
    span = steps[-1] - steps[0]
    shortest = min(b - a for a, b in pairwise(steps))
    number = max(1, min(most, span // shortest + 1))
    if number == 1:
        return [len(steps) - 1]
    return [bisect_right(steps, steps[0] + span * (2 * index + 1) // (2 * number - 2)) - 1 for index in range(number)]


def _relative(history: RankHistory) -> list[Table]:
    """Each group's scores over the median of all rows above 0 at the same change."""
    found: list[list[list[float | None]]] = [[] for _ in history.groups]
    for change in range(len(history.steps)):
        known = [score for group in history.groups for score in group.importance[change] if score]
        middle = median(known) if known else 1.0
        for table, group in zip(found, history.groups, strict=True):
            table.append([None if score is None else min(score / middle, 1e300) for score in group.importance[change]])
    return list(found)


def _ranks(history: RankHistory, group: RankGroup, picked: Sequence[int], heat: Heat, hover: bool) -> Chart:
    ends = [_ends(group.ranks, index) for index in range(_height(group))] if hover else []
    said = [f"{history.rows} {index}: rank {count(first)} \u2192 {count(last)}" for index, (first, last) in enumerate(ends)]
    first, last = group.totals
    note = f"total rank {count(first)}" + (f" \u2192 {count(last)}" if len(history.steps) > 1 else "")
    return _map(history, group, group.ranks, picked, heat, said, "Ranks", note)


def _importance(history: RankHistory, group: RankGroup, table: Table, picked: Sequence[int], heat: Heat,
                hover: bool) -> Chart:
    ends = [_ends(group.importance, index) for index in range(_height(group))] if hover else []
    said = [f"{history.rows} {index}: score {_short(first)} \u2192 {_short(last)}" for index, (first, last) in enumerate(ends)]
    sums = [[score for row in part for score in row if score is not None] for part in (table[:1], table[-1:])]
    means = [figure(float(f"{sum(part) / len(part):.2g}")) if part else DASH for part in sums]
    return _map(history, group, table, picked, heat, said, "Importance", f"mean {means[0]}\u00d7 \u2192 {means[1]}\u00d7")


def _map(history: RankHistory, group: RankGroup, table: Table, picked: Sequence[int], heat: Heat, said: Sequence[str],
         what: str, note: str) -> Chart:
    tones = [[heat.tone(table[change][index]) for change in picked] for index in range(_height(group))]
    name = shortened(group.name, 40)
    drawn = heat_map(f"{what} of {name}, {note}", tones, rows=history.rows, said=said,
                     steps=(history.steps[0], history.steps[-1]))
    return Chart(name, Markup(drawn), note)


def _height(group: RankGroup) -> int:
    return len(group.ranks[0])


def _ends(table: Table, index: int) -> tuple[float | None, float | None]:
    """The first and the last known value of a row."""
    known = [row[index] for row in table if row[index] is not None] or [None]
    return known[0], known[-1]


def _short(value: float | None) -> str:
    return DASH if value is None else f"{value:.2g}"


def _reading(rows: str) -> str:
    what = {"layer": "a line is a layer, the first one on top",
            "frequency": "a line is a frequency over the layers: a pattern in which their changes rise and fall together, "
                         "with the usual transforms from what all layers share (on top) to what differs from one to the next"}
    return (f"Each map is one group of layers with the same role and shape; training goes from left to right, "
            f"{what.get(rows, 'a line is one ' + rows)}, and the stronger the colour, the more rank it is given at that time: "
            "where a line fades, its parameters went to lines that matter more, and where it is empty, nothing is left.")


def _curves(history: RankHistory) -> list[Chart]:
    charts = []
    if history.parameters or history.budget:
        lines = [Series("kept", history.parameters, 0), Series("budget", history.budget, 1)]
        title = "Parameters kept and allowed"
        charts.append(Chart(title, Markup(line_chart(title, lines, y_label="parameters", zero=True, form=count))))
    if any(value > 0 for _, value in history.residual):
        title = "Deviation from orthonormal factors"
        drawn = line_chart(title, [Series("residual", history.residual)], log=True)
        charts.append(Chart(title, Markup(drawn), "largest of all groups"))
    return charts
