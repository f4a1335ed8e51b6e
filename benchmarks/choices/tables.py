"""The tables of docs/results/capacity.md, between the page's markers; all other text is kept."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.report import filled

from choices.runs import LENGTHS, mean_of
from deltaloom.files import write_atomic

Records = list[dict[str, Any]]
BINS = [f"to {bound}" for bound in LENGTHS] + [f"over {LENGTHS[-1]}"]


def belongs(record: dict[str, Any], task: str, candidates: Mapping[str, Any], sizes: Collection[int | None]) -> bool:
    """Whether a stage tells of this run."""
    spec = record["spec"]
    return (spec["task"] == task and candidates.get(spec["candidate"]) == spec["deltas"] and spec["rows"] in sizes
            and "sets" in record)


def write(stages: Mapping[str, Records], page: Path) -> None:
    """Fill the page's marked parts."""
    text = page.read_text(encoding="utf-8") if page.exists() else skeleton(stages)
    for name, records in stages.items():
        told = [record for record in records if record["spec"]["part"] == "dev"]
        sizes = sorted({record["spec"]["rows"] for record in told}, key=lambda rows: rows or 10**9)
        parts = [f"`python benchmarks/choosing.py {name} --data DIR`", *(accuracy_table(told, rows) for rows in sizes)]
        if not told:
            parts.append("Not run yet.")
        elif name == "capacity":
            parts.append(length_table(told))
        text = filled(text, name, "\n\n".join(parts))
    write_atomic(page, text)
    print(page)


def skeleton(stages: Mapping[str, Records]) -> str:
    """The page without any figure."""
    parts = [f"## {name}\n\n<!-- begin: {name} -->\n<!-- end: {name} -->\n" for name in stages]
    return "# Which method, how many parameters\n\n" + "\n".join(parts)


def accuracy_table(records: Records, rows: int | None) -> str:
    """Candidates of one number of training rows, the best mean first: mean and standard deviation over seeds, in percent."""
    mine = [record for record in records if record["spec"]["rows"] == rows]
    sets = list(mine[0]["sets"])
    by_name: dict[str, Records] = {}
    for record in mine:
        by_name.setdefault(record["spec"]["candidate"], []).append(record)
    head = ["candidate", "parameters", "rate", *(f"{name}, accuracy" for name in sets), "seeds", "seconds"]
    body = []
    for name in sorted(by_name, key=lambda name: -statistics.mean(mean_of(run, "accuracy") or 0 for run in by_name[name])):
        runs = by_name[name]
        figures = [spread([100 * run["sets"][each]["accuracy"] for run in runs]) for each in sets]
        body.append([name, f"{statistics.mean(run['final_parameters'] for run in runs):,.0f}", f"{runs[0]['spec']['rate']:g}",
                     *figures, str(len(runs)), f"{statistics.median(run['seconds'] for run in runs):.0f}"])
    title = "All training rows" if rows is None else f"{rows:,} training rows" + (" of each kind" if "movies" in sets else "")
    return f"{title}:\n\n" + table(head, body)


def length_table(records: Records) -> str:
    """Accuracy by length of the input, in percent, all seeds together."""
    body = []
    for name in dict.fromkeys(record["spec"]["candidate"] for record in records):
        runs = [record["sets"]["sst2"]["lengths"] for record in records if record["spec"]["candidate"] == name]
        cells = []
        for each in BINS:
            right, total = (sum(run.get(each, [0, 0])[place] for run in runs) for place in (0, 1))
            cells.append(f"{100 * right / total:.1f}" if total else "-")
        body.append([name, *cells])
    return "By words of the input (SST-2 dev):\n\n" + table(["candidate", *BINS], body)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))
