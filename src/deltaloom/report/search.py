"""What a search found, for people: a line for each trial, the table at the end, and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from deltaloom import __version__
from deltaloom.report import text
from deltaloom.report.charts import Bar, Chart, Mark, bar_chart, scatter_chart
from deltaloom.report.page import content_policy
from deltaloom.report.parallel import MOST_AXES, MOST_STRANDS, Axis, Strand, parallel_chart
from deltaloom.search.outcome import Objective, Record, best_of

SHOWN, MOST_ROWS = 10, 1000
WORDS = {"complete": "", "pruned": "pruned", "infeasible": "outside a constraint", "failed": "failed", "lost": "cut off",
         "running": "running", "waiting": "waiting"}


def trial_line(records: Sequence[Record], number: int, objectives: Sequence[Objective], total: int) -> str:
    """What a person reads when a trial has ended."""
    record = records[number]
    kept = [each.number for each in records if each.state != "lost"]
    values = ", ".join(f"{name} {text.measured(value)}" for name, value in record.values.items())
    said = f"trial {number} ({kept.index(number) + 1} of {max(total, len(kept))})" if number in kept else f"trial {number}"
    state = WORDS[record.state] + (f": {record.reason}" if record.reason else "")
    line = f"{said}: {', '.join(part for part in (values, state) if part)} in {text.duration(record.seconds)}"
    best = best_of(records, objectives)
    if best is not None:
        line += (" (best so far)" if best.number == number
                 else f" (best {text.measured(best.values[objectives[0].name])}, trial {best.number})")
    return text.one_line(f"{line}; {settings_text(record.settings)}", 600)


def search_text(found: Mapping[str, Any]) -> str:
    """The table that a person sees at the end: the best trials, and how many there were of each kind."""
    names = [objective["name"] for objective in found["objectives"]]
    ranked = _ranked(found)
    rows = [(trial["number"], *[text.measured(trial["values"][name]) for name in names], text.duration(trial["seconds"]),
             settings_text(trial["settings"])) for trial in ranked[:SHOWN]]
    parts = [text.table_text(("trial", *names, "time", "settings"), rows, "Best trials")] if rows else []
    parts.append(f"Trials: {_counts(found)}")
    return "\n".join(parts)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings on one line."""
    return ", ".join(f"{name} {_value(value)}" for name, value in settings.items())


def search_page(name: str, found: Mapping[str, Any]) -> str:
    """The page as text."""
    folder = files("deltaloom.report")
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"count": text.count, "measured": text.measured, "duration": text.duration, "value": _value}
    ranked = _ranked(found)
    others = [trial for trial in found["trials"] if trial["state"] != "complete"]
    columns = list(dict.fromkeys(key for trial in found["trials"] for key in trial["settings"]))
    return environment.from_string(folder.joinpath("search.html.j2").read_text(encoding="utf-8")).render(
        policy=content_policy(style), style=Markup(style), version=__version__, name=name, found=found,
        names=[objective["name"] for objective in found["objectives"]], columns=columns, counts=_counts(found),
        trials=(ranked + others)[:MOST_ROWS], left_out=max(0, len(ranked) + len(others) - MOST_ROWS), words=WORDS,
        front={trial["number"] for trial in found["pareto"]}, history=_history(found), importance=_importance(found),
        fronts=_fronts(found), parallel=_parallel(found, ranked))


def _ranked(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The complete trials, the best first objective first."""
    first = found["objectives"][0]
    sign = -1 if first["higher_is_better"] else 1
    whole = [trial for trial in found["trials"] if trial["state"] == "complete"]
    return sorted(whole, key=lambda trial: (sign * trial["values"][first["name"]], trial["number"]))


def _counts(found: Mapping[str, Any]) -> str:
    numbers: dict[str, int] = {}
    for trial in found["trials"]:
        numbers[trial["state"]] = numbers.get(trial["state"], 0) + 1
    return ", ".join(f"{number} {WORDS[state] or state}" for state, number in numbers.items()) or "none"


def _said(trial: Mapping[str, Any]) -> str:
    values = ", ".join(f"{name} {text.measured(value)}" for name, value in trial["values"].items())
    state = f" ({WORDS[trial['state']]})" if WORDS[trial["state"]] else ""
    return f"trial {trial['number']}{state}: {values}; {settings_text(trial['settings'])}"


def _history(found: Mapping[str, Any]) -> Chart | None:
    """The first objective of each trial, and the best so far."""
    first = found["objectives"][0]
    name, better = first["name"], max if first["higher_is_better"] else min
    known = [trial for trial in found["trials"] if trial["values"].get(name) is not None]
    marks = [Mark(trial["number"], trial["values"][name], _said(trial), ring=trial["state"] != "complete") for trial in known]
    line: list[tuple[float, float]] = []
    for trial in known:
        if trial["state"] == "complete":
            value = trial["values"][name]
            line.append((trial["number"], better(line[-1][1], value) if line else value))
    title = f"{name} of each trial"
    note = "rings: pruned, or outside a constraint; line: the best so far"
    return Chart(title, Markup(scatter_chart(title, marks, x_label="trial", y_label=name, line=line)), note) if marks else None


def _importance(found: Mapping[str, Any]) -> list[Chart]:
    """For each objective, how much each setting decides."""
    charts = []
    for objective, shares in found["importance"].items():
        bars = [Bar(name, share) for name, share in shares.items() if share is not None]
        if bars:
            title = f"What decides {objective}"
            charts.append(Chart(title, Markup(bar_chart(title, bars[:20], most=1.0, form=text.share)), "PED-ANOVA, sums to 100%"))
    return charts


def _fronts(found: Mapping[str, Any]) -> list[Chart]:
    """The first objective against each other one; the front is that of all objectives together."""
    charts = []
    first, *others = [objective["name"] for objective in found["objectives"]]
    whole = _ranked(found)
    on_front = {trial["number"] for trial in found["pareto"]}
    for other in others if whole else []:
        marks = [Mark(trial["values"][other], trial["values"][first], _said(trial), colour=1,
                      ring=trial["number"] not in on_front) for trial in whole]
        line = sorted((mark.x, mark.y) for mark in marks if not mark.ring) if len(others) == 1 else []
        title = f"{first} against {other}"
        charts.append(Chart(title, Markup(scatter_chart(title, marks, x_label=other, y_label=first, line=line,
                                                        x_form=text.quantity)), "dots: the Pareto front"))
    return charts


def _parallel(found: Mapping[str, Any], ranked: Sequence[Mapping[str, Any]]) -> Chart | None:
    """The settings of the complete trials, the most important first, and the first objective as the last axis."""
    if len(ranked) < 2:
        return None
    first = found["objectives"][0]["name"]
    shares = found["importance"].get(first, {})
    names = list(dict.fromkeys([*shares, *found["space"]]))
    names = [name for name in names if any(name in trial["settings"] for trial in ranked)]
    shown = names[:MOST_AXES - 1]
    axes = [Axis(name, "log" in found["space"].get(name, {})) for name in shown] + [Axis(first)]
    worst, best = ranked[-1]["values"][first], ranked[0]["values"][first]
    strands = [Strand((*[_place(trial["settings"].get(name)) for name in shown], trial["values"][first]),
                      (trial["values"][first] - worst) / (best - worst) if best != worst else 1.0, _said(trial))
               for trial in ranked[:MOST_STRANDS]]
    note = "the more a line stands out, the better"
    note += f"; the {len(shown)} most important of {len(names)} settings" if len(shown) < len(names) else ""
    return Chart("Settings of the trials", Markup(parallel_chart("Settings of the trials", axes, strands)), note)


def _place(value: Any) -> float | str | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return value if isinstance(value, str) else str(value).lower()


def _value(value: Any) -> str:
    if isinstance(value, float):
        return text.figure(value)
    return text.DASH if value is None else text.one_line(str(value).lower() if isinstance(value, bool) else str(value), 80)
