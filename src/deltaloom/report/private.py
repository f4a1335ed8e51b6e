"""What private tuning showed, for people: the bars, the parties' bytes, the leakage table; as text and as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from deltaloom import __version__
from deltaloom.report import text
from deltaloom.report.charts import Bar, bar_chart
from deltaloom.report.page import content_policy

MEANING = {
    "base": "the model as it is",
    "emulator": "the emulator as it is",
    "emulator_tuned": "front tuned on the emulator, at the parties",
    "plugged_in": "that, plugged into the model",
    "split_tuned": "tuned on over the cut, in joint rounds",
    "central_front": "the same front deltas, all rows in one place",
    "central": "deltas on all blocks, all rows in one place",
}
PARTY = ("party", "rows", "rounds", "samples", "up", "down")
LEAKAGE = ("guards", "attack", "knows the front", "tokens", "top 5", "whole texts", "secrets", "majority")
LABELS = ("guards", "attack", "knows", "labels", "recovered", "commonest label", "two classes: AUC")
MEMBERS = ("attack", "update", "members / others", "AUC", "a coin", "a coin's upper end", "AUC of planted secrets")
Found = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """A table of the page, with drawings under it."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    charts: Sequence[Markup] = ()


def demo_text(found: Found) -> str:
    """What the demo prints at the end."""
    metrics, rows = bar_rows(found)
    return "\n\n".join([
        text.table_text(("bar", *metrics, "what it is"), rows, f"{found['held_out']} held-out rows"),
        text.table_text(PARTY, party_rows(found), "Parties"), leakage_text(found["leakage"]),
        f"Took {text.duration(found['seconds'])}."])


def leakage_text(found: Found) -> str:
    """The table of what attacks recover, and what it means."""
    table = text.table_text(LEAKAGE, leakage_rows(found), "What the owner could recover of the text")
    lines = [table, *(f"{one['case']}: {'protective' if one['protective'] else 'NOT protective'}; {one['reason']}"
                      for one in found["verdicts"])]
    lines += [text.table_text(section.columns, section.rows, section.heading) for section in rehearsed_sections(found)]
    if found.get("not_rehearsed"):
        lines.append(f"Not measured: {found['not_rehearsed']}")
    return "\n".join(lines)


def rehearsed_sections(found: Found) -> list[Section]:
    """The tables of label inference and membership, where they were measured."""
    labels = [(one["case"], one["attack"], one["knows"], text.count(one["labels"]), text.share(one["recovered"]),
               text.share(one["majority"]), text.measured(one["auc"])) for one in found.get("labels", ())]
    members = [(one["attack"], one["update"], f"{one['members']} / {one['others']}", text.measured(one["auc"]),
                text.measured(one["chance"]), text.measured(one["coin"]), text.measured(one["canaries"]))
               for one in found.get("membership", ())]
    both = [Section("Labels that stay home, inferred from gradients", LABELS, labels),
            Section("Whose rows were trained on, inferred from a round's update", MEMBERS, members)]
    return [section for section in both if section.rows]


def leakage_rows(found: Found) -> list[tuple[str, ...]]:
    """The lines of the table as text."""
    return [(one["case"], one["attack"], one["knows"], text.share(one["top1"]), text.share(one["top5"]), text.share(one["texts"]),
             text.share(one["canaries"]), text.share(one["majority"])) for one in found["table"]]


def bar_rows(found: Found) -> tuple[list[str], list[tuple[str, ...]]]:
    """(the metrics, a line for each bar)."""
    metrics = list(next(iter(found["bars"].values())))
    return metrics, [(name, *(text.measured(scores.get(metric)) for metric in metrics), MEANING.get(name, ""))
                     for name, scores in found["bars"].items()]


def party_rows(found: Found) -> list[tuple[str, ...]]:
    """A line for each party."""
    return [(name, str(one["rows"]), str(one["rounds"]), str(one["samples"]), text.byte_size(one["up"]),
             text.byte_size(one["down"])) for name, one in found["parties"].items()]


def demo_page(found: Found) -> str:
    """The demo's page: self-contained, without scripts."""
    metrics, rows = bar_rows(found)
    drawn = [metric for metric in metrics if metric != "perplexity" or "loss" not in metrics]  # one is the other's exponential
    charts = [Markup(bar_chart(f"{metric} on held-out rows", [Bar(name, scores[metric]) for name, scores in
                                                              found["bars"].items()])) for metric in drawn]
    sections = [Section("What private tuning is worth", ("bar", *metrics, "what it is"), rows, charts),
                Section("Parties", PARTY, party_rows(found)), *rehearsed_sections(found["leakage"])]
    lead = (f"{found['model']}, cut after {found['cut']} of {found['blocks']} blocks; one owner and {len(found['parties'])} "
            f"parties as processes on one machine, over mutual TLS. Took {text.duration(found['seconds'])}.")
    return _page("Private tuning", lead, sections, found["leakage"])


def leakage_page(name: str, found: Found) -> str:
    """The page of a party's leakage alone."""
    lead = f"{found['rows']} texts attacked with {found['public']} public texts."
    if found.get("not_rehearsed"):
        lead += f" Not measured: {found['not_rehearsed']}."
    return _page(f"Leakage of {name}", lead, rehearsed_sections(found), found)


def _page(title: str, lead: str, sections: Sequence[Section], leakage: Found) -> str:
    folder = files("deltaloom.report")
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(folder.joinpath("private.html.j2").read_text(encoding="utf-8")).render(
        policy=content_policy(style), style=Markup(style), version=__version__, title=title, lead=lead, sections=sections,
        leakage=Section("What the owner could recover of the text", LEAKAGE, leakage_rows(leakage)),
        verdicts=leakage["verdicts"])
