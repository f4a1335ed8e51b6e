"""What a compression did, for people: the terminal's table, a model card, and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from deltaloom import __version__
from deltaloom.report import text
from deltaloom.report.charts import Bar, Chart, bar_chart
from deltaloom.report.page import content_policy

MOST_BARS, MOST_ROWS = 60, 400
CHARTED = ("output_error", "error", "influence", "share", "rank")  # the first column with such a word in its name is drawn


@dataclass(frozen=True)
class MetricRow:
    """One metric before and after; `better` is None where nothing says which way is good."""

    name: str
    before: float | None
    before_range: str
    after: float | None
    after_range: str
    gain: float | None
    better: bool | None


@dataclass(frozen=True)
class StepView:
    """One step: its settings, what it says, its layers as a table, and their chart."""

    name: str
    settings: list[tuple[str, str]]
    seconds: float | None
    bytes: float | None
    parameters: float | None
    figures: list[tuple[str, str]]
    columns: list[str]
    layers: list[list[str]]
    left_out: int
    chart: Chart | None
    kept: int  # tensors that are proven to be as they were


def compression_text(found: Mapping[str, Any]) -> str:
    """The table that a person sees at the end."""
    rows = [(row.name, text.measured(row.before), row.before_range, text.measured(row.after), row.after_range)
            for row in metric_rows(found)]
    parts = []
    if rows:
        title = f"{found['rows']['held_out']} held-out rows"
        parts.append(text.table_text(("metric", "before", "95% interval", "after", "95% interval"), rows, title))
    parts.append(_sizes(found))
    time = found["time"]
    parts.append(f"Time per {time['unit']}: {text.figure(1000 * time['seconds_before'])} ms before, "
                 f"{text.figure(1000 * time['seconds_after'])} ms after ({text.figure(time['speedup'])} times as fast)")
    parts += [f"note: {note}" for note in found["notes"]]
    return "\n".join(parts)


def plan_text(found: Mapping[str, Any]) -> str:
    """What `--plan` shows."""
    rows = [(step["step"]["method"], text.count(step["parameters"]), text.byte_size(step["bytes"])) for step in found["steps"]]
    sure = "" if found["exact"] else "\nThese are upper bounds: values decide the sizes of some layers."
    return text.table_text(("after step", "parameters", "size"), rows) + "\n" + _sizes(found) + sure


def compression_card(name: str, found: Mapping[str, Any]) -> str:
    """README.md of the folder: no path, no secret, no row of the data."""
    header = {"library_name": "transformers", "base_model": str(found["model"]).partition("@")[0],
              "tags": list(dict.fromkeys(["deltaloom", "compressed", *(step["step"]["method"] for step in found["steps"])]))}
    steps = "\n".join(f"{index}. `{_line(step['step'])}`" for index, step in enumerate(found["steps"], 1))
    rows = [f"| {row.name} | {text.measured(row.before)} | {text.measured(row.after)} | {row.after_range or text.DASH} |"
            for row in metric_rows(found)]
    head = [f"On {found['rows']['held_out']} held-out rows:", "", "| metric | before | after | 95% interval after |",
            "|---|---|---|---|"]
    measured = "\n".join([*head, *rows]) if rows else "Its quality was not measured: no held-out rows were given."
    return "\n\n".join([
        "---\n" + yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000) + "---",
        f"# {text.one_line(name, 100)}",
        f"`{text.one_line(str(found['model']))}`, made smaller by deltaloom {found['versions']['deltaloom']} "
        f"(task {found['task']}).", f"## Steps\n\n{steps}", f"## Size and quality\n\n{_sizes(found)}\n\n{measured}",
        "`compression.json` holds every figure, setting and checksum. The licence is that of the original model."]) + "\n"


def compression_page(name: str, found: Mapping[str, Any]) -> str:
    """The page as text."""
    folder = files("deltaloom.report")
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"count": text.count, "figure": text.figure, "measured": text.measured, "signed": text.signed,
                            "share": text.share, "bytes": text.byte_size, "duration": text.duration}
    metrics = metric_rows(found)
    return environment.from_string(folder.joinpath("compression.html.j2").read_text(encoding="utf-8")).render(
        policy=content_policy(style), style=Markup(style), version=__version__, name=name, found=found, metrics=metrics,
        primary=next((row for row in metrics if row.name == found["primary"]["name"]), None),
        kept=found["bytes_after"] / found["bytes_before"], steps=[step_view(step) for step in found["steps"]])


def metric_rows(found: Mapping[str, Any]) -> list[MetricRow]:
    """The metrics before and after."""
    rows = []
    for name, after in found["metrics"].items():
        before = found["base_metrics"].get(name)
        gain = after - before if before is not None and after is not None else None
        primary = found["primary"]
        higher = primary["higher_is_better"] if name == primary["name"] else name not in ("loss", "perplexity", "rmse", "mae")
        rows.append(MetricRow(name, before, _range(found["base_intervals"], name), after, _range(found["intervals"], name), gain,
                              (gain > 0) == higher if gain else None))
    return rows


def step_view(step: Mapping[str, Any]) -> StepView:
    """What the page shows of a step."""
    facts, record = step["facts"], step["step"]
    layers = [*facts["layers"], *(layer for inner in facts["inner"] for layer in inner["facts"]["layers"])]
    columns = list(dict.fromkeys(key for layer in layers for key in layer))
    return StepView(
        name=record["method"], settings=[(key, _value(value)) for key, value in record.items() if key != "method"],
        seconds=step["seconds"], bytes=step["bytes"], parameters=step["parameters"],
        figures=[(key.replace("_", " "), _value(value)) for key, value in facts["figures"].items()],
        columns=columns, layers=[[_value(layer.get(column, "")) for column in columns] for layer in layers[:MOST_ROWS]],
        left_out=max(0, len(layers) - MOST_ROWS), chart=_chart(layers, columns), kept=len(facts["hashes"]))


def _chart(layers: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Chart | None:
    for word in CHARTED:
        for column in columns:
            if word not in column:
                continue
            bars = [Bar(_layer_name(layer), float(layer[column])) for layer in layers if _is_number(layer.get(column))]
            title = f"{column.replace('_', ' ')} by layer"
            note = f"the first {MOST_BARS} of {len(bars)}" if len(bars) > MOST_BARS else ""
            if bars:
                return Chart(title, Markup(bar_chart(title, bars[:MOST_BARS])), note)
    return None


def _layer_name(layer: Mapping[str, Any]) -> str:
    stack = layer.get("stack")
    return f"{stack}.{layer.get('layer')}" if stack else str(layer.get("layer", ""))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _value(value: Any) -> str:
    if value is None:
        return text.DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return text.figure(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    return text.one_line(str(value))


def _line(record: Mapping[str, Any]) -> str:
    given = [f"{key}: {_value(value)}" for key, value in record.items() if key != "method" and value not in (None, [], {})]
    return text.one_line(f"{record['method']} ({', '.join(given)})" if given else str(record["method"])).replace("`", "'")


def _range(intervals: Mapping[str, Any], name: str) -> str:
    low, high = intervals.get(name) or (None, None)
    return f"{text.measured(low)} to {text.measured(high)}" if low is not None and high is not None else ""


def _sizes(found: Mapping[str, Any]) -> str:
    share = found["bytes_after"] / found["bytes_before"]
    return (f"Size: {text.byte_size(found['bytes_before'])} before, {text.byte_size(found['bytes_after'])} after "
            f"({text.share(share)}); {text.count(found['parameters_before'])} parameters before, "
            f"{text.count(found['parameters_after'])} after")
