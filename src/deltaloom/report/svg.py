"""The small change of hand-written SVG: escaped elements, scales, nice ticks, thinned curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from deltaloom.report.text import printable

_LARGEST = 1e290

Point = tuple[float, float]


def element(name: str, content: str = "", *, text: str = "", title: str = "", **attributes: str | float) -> str:
    """One element; `content` is markup that was escaped before, `text` and `title` are not.

    An underscore at the end of an attribute's name is dropped, others become hyphens: `class_`, `text_anchor`.
    """
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"' for key, value in attributes.items())
    inside = (f"<title>{escaped(title)}</title>" if title else "") + content + escaped(text)
    return f"<{name}{written}>{inside}</{name}>" if inside else f"<{name}{written}/>"


def canvas(width: float, height: float, label: str, content: str) -> str:
    """The drawing; `label` is what a screen reader says of it. It scales with its container."""
    return element("svg", content, viewBox=f"0 0 {_value(width)} {_value(height)}", width=width, height=height, role="img",
                   aria_label=label, class_="chart")


def escaped(text: str) -> str:
    """Text for element content and attributes."""
    return escape(printable(text))


def shortened(text: str, most: int) -> str:
    """The text cut in its middle, so that both ends of a long site name stay readable."""
    if len(text) <= most:
        return text
    head = most // 2
    return f"{text[:head]}\u2026{text[len(text) - (most - head - 1):]}"


@dataclass(frozen=True)
class Scale:
    """Maps values from `low`..`high` to pixels `start`..`stop`, linearly or by logarithm."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value; values outside are drawn at the border."""
        low, high, value = (math.log10(number) if self.log else number for number in (self.low, self.high, self._inside(value)))
        return self.start + (self.stop - self.start) * ((value - low) / (high - low))

    def _inside(self, value: float) -> float:
        return min(self.high, max(self.low, value))

    def ticks(self, most: int) -> list[float]:
        """At most about `most` round values inside the scale."""
        if self.log:
            return _log_ticks(self.low, self.high, most)
        step = _nice((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        values = [(first + index) * step for index in range(most + 2)]
        return [0.0 if abs(value) < step * 1e-9 else value for value in values if value <= self.high + step * 1e-6]


def scale(values: Sequence[float], start: float, stop: float, *, log: bool = False, zero: bool = False,
          round_to: int = 0) -> Scale:
    """A scale over the values; a flat or huge range is widened or clipped, so that it can always be drawn.

    `zero` includes zero; `round_to` widens the range to about so many round ticks.
    """
    kept = [min(_LARGEST, max(-_LARGEST, value)) for value in values] or [0.0, 1.0]
    low, high = min(kept), max(kept)
    if log:
        return Scale(low, high, start, stop, True) if high / low > 1.01 else Scale(low / 2, high * 2, start, stop, True)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= max(1e-280, 1e-9 * max(abs(low), abs(high))):
        margin = abs(high) * 0.1 if abs(high) > 1e-270 else 1.0
        low, high = (low if zero and low == 0 else low - margin), high + margin
    if round_to:
        step = _nice((high - low) / round_to)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Scale(low, high, start, stop)


def thinned(points: Sequence[Point], most: int = 400) -> list[Point]:
    """At most about `most` points: of each stretch its lowest and highest, so that spikes stay visible."""
    if len(points) <= most:
        return list(points)
    kept: list[Point] = []
    stretches = max(1, most // 2)
    for index in range(stretches):
        part = points[index * len(points) // stretches:(index + 1) * len(points) // stretches]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept.extend(sorted(ends))
    return kept


def _nice(step: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if factor * power >= step * (1 - 1e-9))


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / most))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [factor * 10.0 ** power for power in range(first, last + 1, stride) for factor in factors]
    return [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def _value(value: str | float) -> str:
    if isinstance(value, str):
        return escaped(value)
    return f"{value:.1f}".removesuffix(".0")
