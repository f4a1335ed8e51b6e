"""Parallel coordinates: one vertical axis for each setting, one line for each trial, its tone says how good it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deltaloom.report.svg import Scale, canvas, element, scale, shortened
from deltaloom.report.text import DASH, figure

TONES = 9
MOST_AXES, MOST_STRANDS, MOST_WORDS = 9, 200, 12
_WIDTH, _HEIGHT, _TOP, _BOTTOM, _SIDE = 860.0, 330.0, 44.0, 34.0, 70.0
Value = float | str | None
"""A number, a word, or nothing: the setting does not count in this trial."""


@dataclass(frozen=True)
class Axis:
    """One axis; `log` is for numbers."""

    name: str
    log: bool = False


@dataclass(frozen=True)
class Strand:
    """One trial: a value for each axis, its quality from 0 (worst) to 1, and what a pointer on it is told."""

    values: tuple[Value, ...]
    quality: float
    said: str


def parallel_chart(title: str, axes: Sequence[Axis], strands: Sequence[Strand]) -> str:
    """The drawing; the better lines lie on top. Axes and lines beyond a readable number are left out by the caller."""
    step = (_WIDTH - 2 * _SIDE) / max(1, len(axes) - 1)
    places = [_SIDE + index * step for index in range(len(axes))]
    columns = [[strand.values[index] for strand in strands] for index in range(len(axes))]
    heights = [_heights(axis, column) for axis, column in zip(axes, columns, strict=True)]
    drawn = [_axis(axis, x, index, marks) for index, (axis, x, (_, marks)) in enumerate(zip(axes, places, heights, strict=True))]
    parts = []
    for strand in sorted(strands, key=lambda strand: strand.quality):
        points = " ".join(f"{x:.1f},{height(value):.1f}"
                          for x, value, (height, _) in zip(places, strand.values, heights, strict=True))
        tone = round(min(1.0, max(0.0, strand.quality)) * (TONES - 1))
        parts.append(element("polyline", points=points, class_=f"strand t{tone}", title=strand.said))
    said = f"{title}. {len(strands)} trials over {', '.join(axis.name for axis in axes)}"
    return canvas(_WIDTH, _HEIGHT, said, "".join([*parts, *drawn]))


def _heights(axis: Axis, column: Sequence[Value]) -> tuple[Callable[[Value], float], list[tuple[str, float]]]:
    """(the pixel of a value, labels with their pixels)."""
    numbers = [value for value in column if isinstance(value, int | float)]
    words = list(dict.fromkeys(value for value in column if isinstance(value, str)))
    absent = None in column
    floor = _HEIGHT - _BOTTOM
    low = floor - (34 if absent else 0)
    marks = [(DASH, floor)] if absent else []
    if words:
        words = sorted({*words, *(str(number) for number in numbers)})
        gap = (low - _TOP) / max(1, len(words) - 1)
        known = {word: low - index * gap for index, word in enumerate(words)}
        marks += [(shortened(word, 18), known[word]) for word in words[:MOST_WORDS]]
        return lambda value: floor if value is None else known[str(value)], marks
    own: Scale = scale(numbers, low, _TOP, log=axis.log and bool(numbers) and min(numbers) > 0)
    marks += [(figure(tick), own(tick)) for tick in own.ticks(5)] if numbers else []
    return lambda value: own(value) if isinstance(value, int | float) else floor, marks


def _axis(axis: Axis, x: float, index: int, marks: Sequence[tuple[str, float]]) -> str:
    name, y = shortened(axis.name, 26), 14.0 if index % 2 else 30.0
    parts = [element("line", x1=x, x2=x, y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="axis"),
             element("text", text=name, x=x, y=y, text_anchor="middle", class_="strong")]
    parts += [element("text", text=label, x=x - 6, y=y + 4, text_anchor="end", class_="over") for label, y in marks]
    return element("g", "".join(parts), title=axis.name)
