"""One self-contained HTML page about one run, or about several side by side: no script, nothing loaded, everything escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from deltaloom import __version__
from deltaloom.errors import ResourceError, UsageError
from deltaloom.files import write_atomic
from deltaloom.report import text
from deltaloom.report.charts import SERIES, Bar, Change, Chart, Series, bar_chart, before_after, line_chart
from deltaloom.report.compare import compare, run_names
from deltaloom.report.facts import read_run
from deltaloom.report.privacy import COLUMNS
from deltaloom.report.rankview import RankView, rank_views
from deltaloom.report.tables import Points, RunFacts

_LOG_RATIO = 30.0  # a loss that falls further than this is easier to read on a logarithmic axis


@dataclass(frozen=True)
class RunView:
    """What the template shows of one run: its facts and the drawings made from them; `prefix` keeps ids of several runs apart."""

    facts: RunFacts
    name: str
    prefix: str
    steps: str
    charts: list[Chart]
    changes: Chart | None
    classes: Chart | None
    labels: Chart | None
    ranks: list[RankView]
    has_data: bool
    sections: list[tuple[str, bool]]


def write_report(run_folders: Sequence[Path], output: Path) -> Path:
    """Write the page about these runs to `output` (atomically) and give back its path.

    A run that was interrupted gets a page as well, which says what is missing.

    Raises:
        UsageError: no folder given, or one does not exist.
        ResourceError: the page could not be written.
    """
    if not run_folders:
        raise UsageError("A report needs at least one run folder", hint="Give the folder that `deltaloom tune` wrote.")
    runs = [read_run(folder) for folder in run_folders]
    page = render(runs, run_names(run_folders))
    try:
        write_atomic(output, page)
    except OSError as error:
        raise ResourceError("The report could not be written", got=str(output), hint=f"{error.strerror}.") from error
    return output


def render(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    """The page as text, from facts that were read before; `names` tell the runs apart."""
    style = files("deltaloom.report").joinpath("page.css").read_text(encoding="utf-8")
    template = files("deltaloom.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"count": text.count, "figure": text.figure, "measured": text.measured, "quantity": text.quantity,
                            "signed": text.signed, "share": text.share, "bytes": text.byte_size, "duration": text.duration,
                            "ranks": text.rank_range}
    several = len(runs) > 1
    views = [_view(run, name, f"run{index}-" if several else "")
             for index, (run, name) in enumerate(zip(runs, names, strict=True))]
    return environment.from_string(template).render(
        policy=content_policy(style), style=Markup(style), version=__version__, runs=views, privacy_columns=COLUMNS,
        title=" · ".join(names) if len(names) < 4 else f"{len(names)} runs",
        comparison=compare(runs, names) if several else None, overlaid=_overlaid(runs, names) if several else [])


def content_policy(style: str) -> str:
    """Nothing may be loaded or run; only this very style sheet counts (so no smuggled style attribute does either)."""
    digest = base64.b64encode(hashlib.sha256(style.encode("utf-8")).digest()).decode("ascii")
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _view(run: RunFacts, name: str, prefix: str) -> RunView:
    loss = run.curves.get("loss", ())
    charts = _curve_charts(run)
    data = run.data
    has_data = any((data.format, data.rows is not None, data.labels, data.lengths, data.others, data.first_rows))
    return RunView(
        facts=run, name=name, prefix=prefix, steps=f"{loss[-1][0]:,.0f} steps; " if loss else "", charts=charts,
        changes=_changes(run), classes=_classes(run), labels=_labels(run), ranks=rank_views(run.ranks), has_data=has_data,
        sections=[("Results", bool(run.metrics)), ("Curves", bool(charts)), ("Samples", bool(run.samples)),
                  ("Privacy", run.privacy is not None), ("Warnings", bool(run.warnings)), ("Sites", bool(run.sites)),
                  ("Ranks", bool(run.ranks)), ("Depth", bool(run.depth)), ("Choices", bool(run.usage)), ("Data", has_data),
                  ("Timeline", bool(run.timeline)),
                  ("Settings", bool(run.settings)), ("Environment", bool(run.environment))])


def _curve_charts(run: RunFacts) -> list[Chart]:
    """The loss (raw and smoothed, with the evaluation loss), one chart for each other metric, then how the training went."""
    charts = []
    loss, eval_loss = run.curves.get("loss", ()), run.evaluations.get("loss", ())
    if loss:
        series = [Series("each step", loss, 0, faint=True), Series("smoothed", _smooth(loss), 0)]
        series += [Series("evaluation", eval_loss, 1, dots=True)] if eval_loss else []
        charts.append(_lines("Loss", series, "nats", log=_far(loss)))
    best = f"best at step {run.best_step:,}" if run.best_step is not None else ""
    for name, points in run.evaluations.items():
        if not (loss and name == "loss"):
            charts.append(_lines(name, [Series(name, points, 0, dots=True)], "evaluation", best))
    others: tuple[tuple[str, str, str, Callable[[float], str], bool], ...] = (
        ("penalty", "Penalty", "", text.figure, False),
        ("learning_rate", "Learning rate", "", text.figure, True),
        ("gradient_norm", "Gradient norm", "", text.figure, True),
        ("tokens_per_second", "Speed", "real tokens per second", text.figure, True),
        ("memory_bytes", "Memory", "", text.byte_size, True),
        ("padding", "Padding", "share of all tokens", text.share, True),
        ("floor_share", "Share of the FLOP floor", "", text.share, True),
    )
    for key, title, unit, form, zero in others:
        if points := run.curves.get(key, ()):
            charts.append(_lines(title, [Series(title, points)], unit, zero=zero, form=form))
    return charts


def _overlaid(runs: Sequence[RunFacts], names: Sequence[str]) -> list[Chart]:
    """One chart a quantity with a curve a run."""
    note = f"colours repeat after {SERIES} runs" if len(runs) > SERIES else ""

    def curves(points: Sequence[Points], dots: bool = False) -> list[Series]:
        return [Series(name, own, index, dots=dots) for index, (name, own) in enumerate(zip(names, points, strict=True))]

    loss = curves([_smooth(run.curves.get("loss", ())) for run in runs])
    speed = curves([_smooth(run.curves.get("tokens_per_second", ())) for run in runs])
    charts = []
    if any(line.points for line in loss):
        charts.append(_lines("Training loss", loss, "nats, smoothed", note, log=any(_far(line.points) for line in loss)))
    for metric in dict.fromkeys(metric for run in runs for metric in run.evaluations):
        series = curves([run.evaluations.get(metric, ()) for run in runs], dots=True)
        charts.append(_lines("Evaluation loss" if metric == "loss" else metric, series, "evaluation", note))
    if any(line.points for line in speed):
        charts.append(_lines("Speed", speed, "real tokens per second, smoothed", note, zero=True))
    return charts


def _lines(title: str, series: Sequence[Series], y_label: str, note: str = "", *, log: bool = False, zero: bool = False,
           form: Callable[[float], str] = text.figure) -> Chart:
    return Chart(title, Markup(line_chart(title, series, y_label=y_label, log=log, zero=zero, form=form)), note)


def _smooth(points: Points) -> Points:
    values = text.smoothed([value for _, value in points])
    return tuple((step, value) for (step, _), value in zip(points, values, strict=True))


def _far(points: Sequence[tuple[float, float]]) -> bool:
    values = [value for _, value in points]
    return bool(values) and min(values) > 0 and max(values) / min(values) > _LOG_RATIO


def _changes(run: RunFacts) -> Chart | None:
    """Metrics that are fractions, as before and after; losses and others stay in the table."""
    changes = []
    for metric in run.metrics[:20]:
        known = [value for value in (metric.value, metric.base, metric.low, metric.high, metric.majority) if value is not None]
        if metric.value is not None and metric.higher_is_better and all(0 <= value <= 1 for value in known):
            changes.append(Change(metric.name, metric.base, metric.value, metric.low, metric.high, metric.majority))
    return Chart("Before and after tuning", Markup(before_after("Metrics before and after tuning", changes))) if changes else None


def _classes(run: RunFacts) -> Chart | None:
    bars = []
    for row in run.classes[:60]:
        if row.f1 is not None:
            said = f"precision {text.figure(row.precision)}, recall {text.figure(row.recall)}, {text.count(row.support)} rows"
            bars.append(Bar(row.label, row.f1, row.low, row.high, said))
    note = f"the first {len(bars)} of {len(run.classes)}" if len(bars) < len(run.classes) else ""
    return Chart("F1 of each class", Markup(bar_chart("F1 of each class", bars, most=1.0)), note) if bars else None


def _labels(run: RunFacts) -> Chart | None:
    """The most frequent labels; what does not fit is summed up in the note."""
    if not run.data.labels:
        return None
    ordered = sorted(run.data.labels, key=lambda label: -label[1])
    bars = [Bar(name, number, detail="" if held is None else f"{held:,} evaluation rows") for name, number, held in ordered[:40]]
    rest = sum(number for _, number, _ in ordered[40:])
    note = f"the {len(bars)} most frequent of {len(ordered)}; {rest:,} rows have others" if len(ordered) > 40 else ""
    return Chart("Training rows of each label", Markup(bar_chart("Training rows of each label", bars, form=text.count)), note)
