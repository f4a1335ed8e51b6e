"""Hand-written SVG charts: lines, bars with intervals, before-and-after; heat maps are in `heat`.

They hold no colours: classes `s0`..`s5` and the other class names get theirs from the page's style sheet (light, dark,
print), and lines also differ by their dashes. Every mark has a hover title; each drawing has a label for screen readers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from deltaloom.report import text
from deltaloom.report.svg import Point, Scale, canvas, element, scale, shortened, thinned
from deltaloom.report.text import DASH, figure

SERIES = 6
_WIDTH, _HEIGHT = 560.0, 250.0
_WIDE = 860.0  # before-and-after gets a row of its own
_LEFT, _RIGHT, _BOTTOM = 58.0, 14.0, 38.0
_HOVER_COLUMNS = 100
_LETTER = 6.6  # average width of a letter at the charts' font size; only legends and labels depend on it


@dataclass(frozen=True)
class Chart:
    """A drawing with its caption; `svg` was escaped by the chart functions."""

    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class Series:
    """One curve: `colour` counts from 0, repeating after six; `faint`: raw values under a smoothed curve; `dots` marks points."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Bar:
    """One horizontal bar with the bounds of its interval, if known."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Change:
    """One metric before and after, with the interval of the value after and a reference mark (the majority answer)."""

    name: str
    before: float | None
    after: float
    low: float | None = None
    high: float | None = None
    mark: float | None = None


def line_chart(title: str, series: Sequence[Series], *, x_label: str = "step", y_label: str = "", log: bool = False,
               zero: bool = False, form: Callable[[float], str] = figure) -> str:
    """Curves over a common horizontal axis.

    A logarithmic axis needs positive values; with others the axis is linear, and the label says which it is.
    """
    drawn = [Series(line.name, thinned(line.points), line.colour, line.faint, line.dots) for line in series if line.points]
    values = [value for line in drawn for _, value in line.points]
    log = log and bool(values) and min(values) > 0
    legend, top = _legend(drawn)
    x = scale([step for line in drawn for step, _ in line.points], _LEFT, _WIDTH - _RIGHT)
    y = scale(values, _HEIGHT - _BOTTOM, top, log=log, zero=zero, round_to=0 if log else 4)
    parts = [legend, _axes(x, y, x_label, y_label + (" (log scale)" if log else ""), form, top)]
    parts += [_curve(line, x, y, form) for line in drawn]
    parts.append(_hover(drawn, x, x_label, form, top))
    ends = "; ".join(f"{line.name}: {form(line.points[0][1])} to {form(line.points[-1][1])}" for line in drawn if not line.faint)
    return canvas(_WIDTH, _HEIGHT, f"{title}. {ends or 'no values'}", "".join(parts))


@dataclass(frozen=True)
class Mark:
    """One point of a scatter chart; `ring`: drawn hollow; `said` is its hover title."""

    x: float
    y: float
    said: str
    colour: int = 0
    ring: bool = False


def scatter_chart(title: str, marks: Sequence[Mark], *, x_label: str, y_label: str, line: Sequence[Point] = (),
                  x_form: Callable[[float], str] | None = None, form: Callable[[float], str] = figure) -> str:
    """Points, and a line that says something about them (the best so far, a front). Without `x_form` the x axis counts."""
    x = scale([mark.x for mark in marks] + [place for place, _ in line], _LEFT + 8, _WIDTH - _RIGHT - 8)
    y = scale([mark.y for mark in marks] + [value for _, value in line], _HEIGHT - _BOTTOM, 14.0, round_to=4)
    parts = [_axes(x, y, x_label, y_label, form, 14.0, x_form)]
    if len(line) > 1:
        places = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in line)
        parts.append(element("polyline", points=places, class_="line s1"))
    for mark in sorted(marks, key=lambda mark: not mark.ring):
        style = "ring" if mark.ring else f"dot s{mark.colour % SERIES}"
        parts.append(element("circle", cx=x(mark.x), cy=y(mark.y), r=4.2 if mark.ring else 4.6, class_=style, title=mark.said))
    return canvas(_WIDTH, _HEIGHT, f"{title}. {len(marks)} points", "".join(parts))


def bar_chart(title: str, bars: Sequence[Bar], *, most: float | None = None, form: Callable[[float], str] = figure) -> str:
    """Horizontal bars with interval whiskers; `most` fixes the end of the axis (1 for fractions)."""
    left = _label_width([bar.name for bar in bars])
    height = 24.0 * len(bars) + 26
    ends = [value for bar in bars for value in (bar.value, bar.low, bar.high) if value is not None]
    x = scale([*ends, most] if most is not None else ends, left, _WIDTH - 70, zero=True)
    parts = [_vertical_grid(x, height, form)]
    for index, bar in enumerate(bars):
        middle = 24.0 * index + 14
        begin, end = sorted((x(0), x(bar.value)))
        said = f"{bar.name}: {form(bar.value)}{_interval(bar.low, bar.high, form)}{', ' + bar.detail if bar.detail else ''}"
        parts.append(element("g", "".join((
            element("text", text=shortened(bar.name, 30), x=left - 8, y=middle + 4, text_anchor="end"),
            element("rect", x=begin, y=middle - 7, width=max(1.0, end - begin), height=14, class_="bar s0"),
            _whisker(bar.low, bar.high, x, middle),
            element("text", text=form(bar.value), x=_WIDTH - 4, y=middle + 4, text_anchor="end", class_="strong"))), title=said))
    said = "; ".join(f"{bar.name} {form(bar.value)}" for bar in bars[:20])
    return canvas(_WIDTH, height, f"{title}. {said or 'no values'}", "".join(parts))


def before_after(title: str, changes: Sequence[Change], *, form: Callable[[float], str] = figure) -> str:
    """One row a metric on an axis from 0 to 1: an open ring before, a filled dot after with its interval, a tick for the mark."""
    left = _label_width([change.name for change in changes])
    height = 34.0 * len(changes) + 26
    x = scale([0.0, 1.0], left, _WIDE - 16)
    parts = [_vertical_grid(x, height, form)]
    for index, change in enumerate(changes):
        parts.append(_change(change, x, 34.0 * index + 20, left, form))
    said = "; ".join(f"{change.name} {form(change.before) if change.before is not None else 'unknown'} to {form(change.after)}"
                     for change in changes)
    return canvas(_WIDE, height, f"{title}. {said or 'no values'}", "".join(parts))


def _legend(series: Sequence[Series]) -> tuple[str, float]:
    """The legend's markup and where the plot begins below it; one curve needs no legend."""
    if len(series) < 2:
        return "", 12.0
    parts, x, y = [], _LEFT, 12.0
    for line in series:
        name = shortened(line.name, 40)
        needed = 30 + _LETTER * len(name)
        if x > _LEFT and x + needed > _WIDTH - _RIGHT:
            x, y = _LEFT, y + 17
        parts.append(element("line", x1=x, x2=x + 20, y1=y, y2=y, class_=_style(line)))
        parts.append(element("text", text=name, x=x + 25, y=y + 4))
        x += needed + 12
    return "".join(parts), y + 16


def _style(line: Series) -> str:
    return f"line s{line.colour % SERIES}{' faint' if line.faint else ''}"


def _axes(x: Scale, y: Scale, x_label: str, y_label: str, form: Callable[[float], str], top: float,
          x_form: Callable[[float], str] | None = None) -> str:
    parts = []
    for tick in y.ticks(4):
        parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(element("text", text=form(tick), x=_LEFT - 7, y=y(tick) + 4, text_anchor="end"))
    ticks = [tick for tick in x.ticks(6) if x_form is not None or tick == round(tick)]
    told = x_form or text.count
    parts += [element("text", text=told(tick), x=x(tick), y=_HEIGHT - _BOTTOM + 17, text_anchor="middle") for tick in ticks]
    parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=_HEIGHT - _BOTTOM, y2=_HEIGHT - _BOTTOM, class_="axis"))
    parts.append(element("text", text=x_label, x=_WIDTH - _RIGHT, y=_HEIGHT - 5, text_anchor="end", class_="label"))
    if y_label:
        parts.append(element("text", text=y_label, x=_LEFT, y=_HEIGHT - 5, class_="label"))
    return "".join(parts)


def _curve(line: Series, x: Scale, y: Scale, form: Callable[[float], str]) -> str:
    places = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line.points)
    drawn = element("polyline", points=places, class_=_style(line)) if len(line.points) > 1 else ""
    if (line.dots and len(line.points) <= 60) or len(line.points) == 1:
        drawn += "".join(element("circle", cx=x(step), cy=y(value), r=3.2, class_=f"dot s{line.colour % SERIES}",
                                 title=f"{line.name}, {step:,.0f}: {form(value)}") for step, value in line.points)
    return drawn


def _hover(series: Sequence[Series], x: Scale, x_label: str, form: Callable[[float], str], top: float) -> str:
    """Invisible columns whose hover titles tell every curve's value there: a tooltip without a script."""
    steps = sorted({step for line in series for step, _ in line.points})
    chosen = steps
    if len(steps) > _HOVER_COLUMNS:
        chosen = [steps[index * len(steps) // _HOVER_COLUMNS] for index in range(_HOVER_COLUMNS)]
    places = [x(step) for step in chosen]
    edges = [_LEFT, *[(a + b) / 2 for a, b in pairwise(places)], _WIDTH - _RIGHT]
    known = [[step for step, _ in line.points] for line in series]
    parts = []
    for index, step in enumerate(chosen):
        said = [f"{x_label} {step:,.0f}"]
        for line, own in zip(series, known, strict=True):
            place = bisect_right(own, step) - 1
            said.append(f"{line.name}: {form(line.points[place][1]) if place >= 0 else DASH}")
        parts.append(element("rect", x=edges[index], y=top, width=max(0.5, edges[index + 1] - edges[index]),
                             height=_HEIGHT - _BOTTOM - top, class_="hit", title="\n".join(said)))
    return "".join(parts)


def _change(change: Change, x: Scale, middle: float, left: float, form: Callable[[float], str]) -> str:
    said = f"{change.name}: {form(change.after)} after tuning{_interval(change.low, change.high, form)}"
    parts = [element("text", text=shortened(change.name, 30), x=left - 8, y=middle + 4, text_anchor="end")]
    if change.mark is not None:
        parts.append(element("line", x1=x(change.mark), x2=x(change.mark), y1=middle - 9, y2=middle + 9, class_="mark"))
        said += f"; the most frequent answer alone: {form(change.mark)}"
    if change.before is not None:
        said += f"; {form(change.before)} before"
        parts.append(element("line", x1=x(change.before), x2=x(change.after), y1=middle, y2=middle, class_="gain s0"))
        parts.append(element("circle", cx=x(change.before), cy=middle, r=5, class_="ring"))
    parts.append(_whisker(change.low, change.high, x, middle))
    parts.append(element("circle", cx=x(change.after), cy=middle, r=6, class_="dot s0"))
    return element("g", "".join(parts), title=said)


def _vertical_grid(x: Scale, height: float, form: Callable[[float], str]) -> str:
    parts = []
    for tick in x.ticks(5):
        parts.append(element("line", x1=x(tick), x2=x(tick), y1=0, y2=height - 22, class_="grid"))
        parts.append(element("text", text=form(tick), x=x(tick), y=height - 6, text_anchor="middle"))
    return "".join(parts)


def _whisker(low: float | None, high: float | None, x: Scale, middle: float) -> str:
    if low is None or high is None:
        return ""
    path = f"M{x(low):.1f} {middle - 4:.1f}v8m0 -4H{x(high):.1f}m0 -4v8"
    return element("path", d=path, class_="whisker")


def _interval(low: float | None, high: float | None, form: Callable[[float], str]) -> str:
    return "" if low is None or high is None else f" (95% interval {form(low)} to {form(high)})"


def _label_width(names: Sequence[str]) -> float:
    return min(210.0, 16 + _LETTER * max((min(30, len(name)) for name in names), default=4))
