"""Numbers, sizes, times and tables as a person reads them, and text that is safe to print."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

DASH = "\u2013"
_MINUS = "\u2212"
_REPLACEMENT = "\ufffd"
_KEPT = {ord("\n"), ord("\t")}
_CONTROL = {code: _REPLACEMENT for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F),
                                            *range(0x2066, 0x206A), 0xFFFE, 0xFFFF, *range(0xD800, 0xE000)) if code not in _KEPT}


def count(value: float | None) -> str:
    """A whole number with thousands separators: 1,234,567."""
    return DASH if _unusable(value) else f"{value:,.0f}"


def figure(value: float | None) -> str:
    """A measured number at four significant digits: 0.8714, 12.3, 1e-05; thousands get separators."""
    if value is None or _unusable(value):
        return DASH
    if abs(value) >= 1000 and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def measured(value: float | None) -> str:
    """Like `figure`, with its trailing zeros, so that a column of results lines up: 0.8300 under 0.8392."""
    if value is None or _unusable(value):
        return DASH
    return figure(value) if abs(value) >= 1000 or value == 0 else f"{value:#.4g}".removesuffix(".")


def quantity(value: float | None) -> str:
    """A large number with the prefix of its power of 1000: 85.8 M, 1.23 T."""
    if value is None or _unusable(value):
        return DASH
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}" if abs(value) < 1000 * factor else f"{value / factor:,.0f} {prefix}"
    return f"{value:.3g} "


def signed(value: float | None) -> str:
    """A difference with its sign: +0.3100, or \u22120.2000 with a real minus."""
    if value is None or _unusable(value):
        return DASH
    if value == 0:
        return "\u00b10"
    return ("+" if value > 0 else _MINUS) + measured(abs(value))


def share(value: float | None) -> str:
    """A fraction as a percentage: 0.0123 is 1.23%."""
    return DASH if value is None or _unusable(value) else f"{100 * value:.3g}%"


def rank_range(ranks: Sequence[int]) -> str:
    """The mean of some ranks, with the lowest and the highest where they differ: 5.5 (2 to 8)."""
    if not ranks:
        return DASH
    low, high = min(ranks), max(ranks)
    return figure(sum(ranks) / len(ranks)) + (f" ({low:,} to {high:,})" if low < high else "")


def byte_size(value: float | None) -> str:
    """Bytes in powers of 1000: 2.4 MB."""
    if value is None or _unusable(value):
        return DASH
    size = abs(value)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            break
        size /= 1000
    amount = f"{size:.0f}" if unit == "B" or size >= 99.95 else f"{size:.1f}"
    return f"{_MINUS if value < 0 else ''}{amount} {unit}"


def duration(seconds: float | None) -> str:
    """A time span in its two largest units: 0.4s, 3m 20s, 2h 05m, 1d 03h."""
    if seconds is None or _unusable(seconds) or seconds < 0:
        return DASH
    if seconds < 59.95:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if hours == 0:
        return f"{minutes}m {whole % 60:02d}s"
    return f"{hours}h {minutes % 60:02d}m" if days == 0 else f"{days}d {hours % 24:02d}h"


def printable(text: str) -> str:
    """The text without control characters, lone surrogates and direction overrides: it cannot steer a terminal or break XML."""
    return text.translate(_CONTROL)


def one_line(text: str, most: int = 300) -> str:
    """The text on one line, cut after `most` characters with an ellipsis."""
    line = " ".join(printable(text).split())
    return line if len(line) <= most else line[: most - 1] + "\u2026"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table for the terminal: columns whose cells are all numbers are right-aligned; cells are plain text, never markup."""
    cells = [["" if cell is None else printable(str(cell)) for cell in row] for row in rows]
    shown = Table(title=Text(title) if title else None, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        values = [row[index] for row in cells if row[index] not in ("", DASH)]
        numeric = bool(values) and all(value[0] in "0123456789+-." + _MINUS for value in values)
        shown.add_column(Text(column, style="bold"), justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        shown.add_row(*[Text(cell) for cell in row])
    return shown


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], console: Console | None = None) -> None:
    """Print a table to `console`, by default to stderr: human text never goes to stdout."""
    (console or Console(stderr=True)).print(table(title, columns, rows))


def table_text(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "", width: int = 200) -> str:
    """The same table as plain text without colours, `width` characters wide at most."""
    console = Console(width=width, no_color=True, color_system=None, force_terminal=False, highlight=False, record=False)
    with console.capture() as captured:
        console.print(table(title, columns, rows))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


class Smoother:
    """A running average that forgets: each new value counts `weight`, and early values are not dragged towards zero."""

    def __init__(self, weight: float = 0.05) -> None:
        self.weight = weight
        self.value: float | None = None
        self._sum = 0.0
        self._total = 0.0

    def __call__(self, value: float) -> float:
        """Take a value; give back the average so far. A value that is not finite is left out."""
        if math.isfinite(value):
            self._sum = (1 - self.weight) * self._sum + self.weight * value
            self._total = (1 - self.weight) * self._total + self.weight
            self.value = self._sum / self._total
        return self.value if self.value is not None else value


def smoothed(values: Sequence[float]) -> list[float]:
    """The running average of a whole curve; the longer the curve, the longer the memory (about a twenty-fifth of it)."""
    smoother = Smoother(weight=min(0.5, max(0.02, 25 / max(1, len(values)))))
    return [smoother(value) for value in values]


def _unusable(value: float | None) -> bool:
    return value is None or not math.isfinite(value)
