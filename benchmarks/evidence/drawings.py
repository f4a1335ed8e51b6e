"""The drawings of the page as SVG files, by the report's own charts and its style sheet."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from deltaloom.report.charts import SERIES, Bar, bar_chart
from deltaloom.report.svg import Scale, canvas, element, scale
from evidence.catalogue import BUDGETS

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720.0, 380.0, 58.0, 170.0, 14.0, 40.0
LINE = 13.0  # least distance of the names at the right


def save(path: Path, chart: str) -> str:
    """Write a chart as a file of its own, with the styles that the report's page gives it; gives back the file's name."""
    sheet = (files("deltaloom.report") / "page.css").read_text(encoding="utf-8")
    roots = re.findall(r"(?:@media \(prefers-color-scheme: dark\) \{\s*)?:root \{.*?\n\s*\}(?:\n\})?", sheet, re.S)[:2]
    rules = [line for line in sheet.splitlines() if line.startswith(".chart ")]
    style = element("style", "\n".join([*roots, *rules]).replace("&", "&amp;").replace("<", "&lt;"))
    start, rest = chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).split(">", 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{start}>{style}{rest}\n", encoding="utf-8")
    return path.name


def against_parameters(title: str, rows: Sequence[dict[str, Any]], form: Callable[[float], str]) -> str:
    """Means over seeds against parameters (logarithmic), a line a candidate, whiskers of one standard deviation."""
    known = [row for row in rows if row["mean"] is not None]
    names = list(dict.fromkeys(row["candidate"] for row in known))
    ends = [row["mean"] + sign * (row["spread"] or 0.0) for row in known for sign in (-1, 1)]
    x = scale([row["parameters"] for row in known], LEFT + 10, WIDTH - RIGHT, log=True)
    y = scale(ends, HEIGHT - BOTTOM, TOP, round_to=5)
    parts = [_axes(x, y, form)]
    last: list[tuple[float, str, int]] = []
    for index, name in enumerate(names):
        mine = sorted((row for row in known if row["candidate"] == name), key=lambda row: row["parameters"])
        places = " ".join(f"{x(row['parameters']):.1f},{y(row['mean']):.1f}" for row in mine)
        parts.append(element("polyline", points=places, class_=f"line s{index % SERIES}"))
        for row in mine:
            parts.append(_dot(row, index, x, y, form))
        last.append((y(mine[-1]["mean"]), name, index))
    parts.append(_names(last))
    said = "; ".join(f"{row['candidate']} {row['budget']}: {form(row['mean'])}" for row in known)
    return canvas(WIDTH, HEIGHT, f"{title}. {said}", "".join(parts))


def _axes(x: Scale, y: Scale, form: Callable[[float], str]) -> str:
    parts = []
    for tick in y.ticks(6):
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(element("text", text=form(tick), x=LEFT - 7, y=y(tick) + 4, text_anchor="end"))
    base = HEIGHT - BOTTOM
    parts += [element("text", text=f"{tick:,.0f}", x=x(tick), y=base + 17, text_anchor="middle") for tick in x.ticks(6)]
    parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=base, y2=base, class_="axis"))
    parts.append(element("text", text="parameters (log scale)", x=WIDTH - RIGHT, y=HEIGHT - 5, text_anchor="end", class_="label"))
    return "".join(parts)


def _dot(row: dict[str, Any], index: int, x: Scale, y: Scale, form: Callable[[float], str]) -> str:
    place, spread = x(row["parameters"]), row["spread"] or 0.0
    whisker = element("path", class_="whisker", d=f"M{place:.1f} {y(row['mean'] - spread):.1f}V{y(row['mean'] + spread):.1f}")
    said = f"{row['candidate']}, {row['parameters']:,.0f} parameters: {form(row['mean'])} ± {form(spread)}"
    return whisker + element("circle", cx=place, cy=y(row["mean"]), r=3.6, class_=f"dot s{index % SERIES}", title=said)


def _names(last: list[tuple[float, str, int]]) -> str:
    """The candidates' names at the right ends of their lines, moved apart where they would overlap."""
    parts, before, start = [], TOP - LINE, WIDTH - RIGHT + 6
    for place, name, index in sorted(last):
        before = max(place, before + LINE)
        parts.append(element("line", x1=start, x2=start + 18, y1=before, y2=before, class_=f"line s{index % SERIES}"))
        parts.append(element("text", text=name, x=start + 22, y=before + 4))
    return "".join(parts)


def shared_energy(title: str, groups: Sequence[dict[str, Any]]) -> str:
    """Energy inside one common subspace, by group and size, for both sides."""
    known = [group for group in groups if group["layers"]]
    columns = [f"{side} {size}" for side in ("input", "output") for size in known[0]["input"]]
    values = [[group[side][size] for side in ("input", "output") for size in group["input"]] for group in known]
    return cells(title, [f"{group['group']} {group['d_out']}x{group['d_in']}" for group in known], columns, values, 1.0,
                 lambda value: f"{value:.2f}")


def cells(title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], most: float,
          form: Callable[[float], str]) -> str:
    """A table of numbers whose cells are the fuller of colour the nearer they are to `most`; None leaves a cell empty."""
    left, height = 150.0, 24.0
    width = min(70.0, (WIDTH - left) / max(1, len(columns)))
    parts = [element("text", text=name, x=left + width * (index + 0.5), y=14, text_anchor="middle")
             for index, name in enumerate(columns)]
    for number, (name, row) in enumerate(zip(rows, values, strict=True)):
        top = height * number + 22
        parts.append(element("text", text=name, x=left - 8, y=top + 15, text_anchor="end"))
        for index, value in enumerate(row):
            if value is None:
                continue
            place, said = left + width * index, f"{name}, {columns[index]}: {form(value)}"
            parts.append(element("rect", x=place + 0.5, y=top, width=width - 1, height=height - 1, class_="bar s0",
                                 fill_opacity=f"{0.05 + 0.6 * max(0.0, value) / most:.2f}", title=said))
            parts.append(element("text", text=form(value), x=place + width / 2, y=top + 15, text_anchor="middle",
                                 class_="strong"))
    said = "; ".join(f"{name}: {', '.join(form(value) for value in row if value is not None)}"
                     for name, row in zip(rows, values, strict=True))
    return canvas(WIDTH, height * len(rows) + 30, f"{title}. {said}", "".join(parts))


def ranks_of_groups(title: str, ranks: dict[str, list[int]]) -> str:
    """Final ranks: a row a group, a column a layer or frequency."""
    most = max(len(row) for row in ranks.values())
    values = [[*row, *[None] * (most - len(row))] for row in ranks.values()]
    largest = max((rank for row in ranks.values() for rank in row), default=0)
    return cells(title, list(ranks), [str(index) for index in range(most)], values, max(1, largest), lambda value: f"{value:.0f}")


def step_times(rows: Sequence[dict[str, Any]]) -> str:
    """Time ratios as bars, with the range of the rounds."""
    bars = [Bar(f"{row['entry']}, rank {row['rank']}", row["ratio"], min(row["ratios"]), max(row["ratios"])) for row in rows]
    return bar_chart("Step time relative to LoRA; whiskers: lowest and highest round", bars)


def budgets_in_order(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The budgets that rows have, the smallest first."""
    return [budget for budget in BUDGETS if any(row["budget"] == budget for row in rows)]
