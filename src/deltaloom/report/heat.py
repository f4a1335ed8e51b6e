"""Small heat maps over the training steps: many rows and columns in few bytes, with one colour scale for all of them.

Cells of one tone are one path, its runs of equal cells one stroke each: `M0 3h5m2 0h4` are the cells 0-4 and 7-10 of row 3. Tones
are classes `h0`..`h8`, whose colours the style sheet has; a cell of nothing (0 or unknown) is left empty within the frame.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from deltaloom.report.svg import canvas, element
from deltaloom.report.text import figure

TONES = 9
_WIDTH, _LEFT, _TOP = 340.0, 34.0, 3.0
_CLASS = math.log(1.1)
_FARTHEST = 1e4     # a logarithmic scale spans four powers of ten at most; what lies below has the lowest tone


@dataclass(frozen=True)
class Heat:
    """A scale of at most nine tones: `upper` are the upper ends of its classes, `labels` their names in the legend."""

    upper: tuple[float, ...]
    labels: tuple[str, ...]

    def tone(self, value: float | None) -> int | None:
        """The tone (0 to 8) of a value; None for 0, below and unknown. Few classes lie as far apart as nine do."""
        if value is None or value <= 0:
            return None
        place = min(bisect_left(self.upper, value), len(self.upper) - 1)
        return TONES - 1 if len(self.upper) == 1 else round(place * (TONES - 1) / (len(self.upper) - 1))

    @property
    def legend(self) -> list[tuple[int | None, str]]:
        """(tone, label) from nothing to the highest class."""
        return [(self.tone(end), label) for end, label in zip(self.upper, self.labels, strict=True)]


def whole_heat(values: Iterable[int]) -> Heat:
    """Classes of whole numbers, equally wide from the lowest to the highest above 0; up to nine numbers have their own each."""
    known = [value for value in values if value > 0] or [1]
    low, count = min(known), max(known) - min(known) + 1
    classes = min(TONES, count)
    ends = [low + (index + 1) * count // classes - 1 for index in range(classes)]
    starts = [low, *(end + 1 for end in ends[:-1])]
    labels = [f"{a:,}" if a == b else f"{a:,}\u2013{b:,}" for a, b in zip(starts, ends, strict=True)]
    return Heat(tuple(map(float, ends)), tuple(labels))


def log_heat(values: Iterable[float], unit: str = "") -> Heat:
    """Classes that are equally wide in logarithms, over the values above 0 without the outermost hundredths.

    Nine of them, or as many as keep a tenth between their ends.
    """
    known = sorted(value for value in values if value > 0) or [1.0]
    low, high = known[len(known) // 100], known[-1 - len(known) // 100]
    low = max(low, high / _FARTHEST)
    classes = min(TONES, int(math.log(high / low) / _CLASS))
    if classes < 2:
        return Heat((high,), (f"about {_short(high)}{unit}",))
    ends = [low * (high / low) ** ((index + 1) / classes) for index in range(classes)]
    labels = [f"below {_short(ends[0])}", *(f"{_short(a)}\u2013{_short(b)}" for a, b in pairwise(ends[:-1])),
              f"above {_short(ends[-2])}"]
    return Heat(tuple(ends), tuple(label + unit for label in labels))


def heat_map(title: str, tones: Sequence[Sequence[int | None]], *, rows: str, said: Sequence[str], steps: tuple[int, int]) -> str:
    """The drawing of one group: `tones[row][column]`, row 0 on top, columns evenly from the first to the last of `steps`.

    `rows` names what a row is, `said` has the hover text of each row, or nothing.
    """
    count, columns = len(tones), max((len(row) for row in tones), default=0)
    size = min(16.0, max(2.6, 150.0 / max(1, count)))
    width, height = _WIDTH - _LEFT - 4, size * count
    cells = "".join(element("path", d=path, class_=f"h{tone}") for tone, path in sorted(paths(tones).items()))
    hits = "".join(element("path", d=f"M0 {index}h{columns}", title=text) for index, text in enumerate(said))
    place = f"translate({_LEFT:g} {_TOP + size / 2:.2f}) scale({width / max(1, columns):.5g} {size:.5g})"
    parts = [element("g", cells + element("g", hits, class_="over"), class_="heat", transform=place),
             element("rect", x=_LEFT, y=_TOP, width=width, height=height, class_="frame")]
    for index in _row_ticks(count, size):
        parts.append(element("text", text=str(index), x=_LEFT - 5, y=_TOP + size * (index + 0.5) + 4, text_anchor="end"))
    foot = _TOP + height + 15
    parts.append(element("text", text=f"{steps[0]:,}", x=_LEFT, y=foot))
    if steps[1] > steps[0]:
        parts.append(element("text", text=f"{steps[1]:,}", x=_WIDTH - 4, y=foot, text_anchor="end"))
    across = f"{rows} down, step across"
    parts.append(element("text", text=across, x=_LEFT + width / 2, y=foot, text_anchor="middle", class_="label"))
    return canvas(_WIDTH, foot + 6, f"{title}. {count} rows ({rows}), steps {steps[0]:,} to {steps[1]:,}", "".join(parts))


def paths(tones: Sequence[Sequence[int | None]]) -> dict[int, str]:
    """The path data of each tone, in units of cells."""
    found: dict[int, list[str]] = {}
    last: dict[tuple[int, int], int] = {}  # where the last run of a tone ended in a row
    for number, row in enumerate(tones):
        column = 0
        for tone, run in groupby(row):
            length = len(list(run))
            if tone is not None:
                before = last.get((tone, number))
                found.setdefault(tone, []).append(f"M{column} {number}" if before is None else f"m{column - before} 0")
                found[tone].append(f"h{length}")
                last[tone, number] = column + length
            column += length
    return {tone: "".join(parts) for tone, parts in found.items()}


def _row_ticks(count: int, size: float) -> list[int]:
    """Indices of rows that get a number: the first, the last, and others at least two lines of text apart."""
    apart = next((step for step in (1, 2, 5, 10, 20, 50) if step * size >= 14), 100)
    inner = [index for index in range(0, count - 1, apart) if (count - 1 - index) * size >= 14 or index == 0]
    return [*inner, count - 1] if count > 1 and (count - 1) * size >= 10 else inner or [0]


def _short(value: float) -> str:
    return figure(float(f"{value:.2g}"))
