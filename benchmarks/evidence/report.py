"""The page docs/results/adaptive.md: tables and drawings from the JSON lines, between markers; all other text is kept.

    <!-- begin: NAME -->   generated   <!-- end: NAME -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltaloom.files import write_atomic
from evidence.catalogue import BUDGETS, SEEDS, candidate_named
from evidence.drawings import against_parameters, budgets_in_order, ranks_of_groups, save, shared_energy, step_times
from evidence.runs import known_records, read_lines
from evidence.stages import final_rows, screen_rows

COMMANDS = {
    "screen": "python benchmarks/evidence.py screen --data DIR --workers 2",
    "finals": "python benchmarks/evidence.py finals --data DIR --workers 2",
    "e2e": "python benchmarks/evidence.py e2e --data DIR --workers 2",
    "depth": "python benchmarks/evidence.py depth --data DIR",
    "steps": "python benchmarks/adaptive_steps.py --data DIR --ranks 2 4 8"}
TITLES = {"screen": "Screen: SST-2, rows held out of train", "finals": "Finals: SST-2 dev, fresh seeds",
          "e2e": "E2E: loss and BLEU", "depth": "What layers share over depth", "steps": "Step time and memory"}
UNKNOWN = "-"
RANKS_SHOWN = "small"  # the budget whose final ranks are drawn


def write(folder: Path, page: Path, steps: Path, limit: int | None = None) -> None:
    """Fill the page's marked parts, draw, and write summary.json; a page that is not there begins with headings alone."""
    known = known_records(folder)
    depth = [record for record in read_lines(folder / "depth.jsonl") if record["limit"] == limit]
    found: dict[str, Any] = {
        "screen": screen_rows(known, limit), "finals": final_rows(known, "sst2", limit), "e2e": final_rows(known, "e2e", limit),
        "depth": depth, "steps": json.loads(steps.read_text(encoding="utf-8"))["entries"] if steps.exists() else []}
    drawings = page.parent / page.stem
    blocks = {"screen": screen_block(found["screen"]), "finals": final_block(found["finals"], "sst2", drawings),
              "e2e": final_block(found["e2e"], "e2e", drawings), "depth": depth_block(depth, drawings),
              "steps": steps_block(found["steps"], drawings)}
    page.parent.mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8") if page.exists() else skeleton()
    for name, block in blocks.items():
        text = filled(text, name, f"`{COMMANDS[name]}`\n\n{block if found[name] else 'Not run yet.'}")
    write_atomic(page, text)
    write_atomic(folder / "summary.json", json.dumps(found, indent=1) + "\n")
    print(f"{page}, {folder / 'summary.json'}, {len(list(drawings.glob('*.svg')))} drawings")


def skeleton() -> str:
    """The page without any figure."""
    parts = [f"## {TITLES[name]}\n\n<!-- begin: {name} -->\n<!-- end: {name} -->\n" for name in TITLES]
    return "# Adaptive-rank and tensor methods, measured\n\n" + "\n".join(parts)


def filled(text: str, name: str, block: str) -> str:
    """The text with what lies between the markers of that name replaced.

    Raises:
        SystemExit: the markers are not there exactly once.
    """
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"The page needs the lines '{begin}' and '{end}' once each, in this order.")
    return re.sub(re.escape(begin) + ".*" + re.escape(end), lambda _: f"{begin}\n{block}\n{end}", text, flags=re.S)


# ---- the blocks -----------------------------------------------------------------------------------------------------

def screen_block(rows: Sequence[dict[str, Any]]) -> str:
    """A table a budget."""
    parts = []
    for budget in budgets_in_order(rows):
        mine = [row for row in rows if row["budget"] == budget]
        rates = sorted({rate for row in mine for rate in row["rates"]}, key=float)
        head = ["candidate", "settings", "parameters", *(f"loss at {float(rate):g}" for rate in rates), "accuracy at the better",
                "seconds"]
        body = [[row["candidate"], settings_of(row["candidate"]), whole(row["parameters"]),
                 *(loss(row["rates"].get(rate), rate in row["rates"]) for rate in rates), percent(row["accuracy"]),
                 fixed(row["seconds"], 0)] for row in mine]
        parts.append(f"### {budget.capitalize()} budget ({share_of(budget)})\n\n" + table(head, body))
    return "\n\n".join(parts)


def final_block(rows: Sequence[dict[str, Any]], task: str, drawings: Path) -> str:
    """A table a budget, and the drawing."""
    if not rows:
        return ""
    parts = []
    word, show = ("accuracy", percent) if task == "sst2" else ("loss", lambda value, tried=True: fixed(value, 4))
    for budget in budgets_in_order(rows):
        mine = [row for row in rows if row["budget"] == budget]
        seeds = sorted({seed for row in mine for seed in row["seeds"]}, key=int) or [str(seed) for seed in SEEDS]
        head = ["candidate", "parameters", "rate", f"{word}, mean", "standard deviation", "less LoRA's (paired)",
                *(f"seed {seed}" for seed in seeds), *(["BLEU"] if task == "e2e" else []), "seconds"]
        body = [[row["candidate"], whole(row["parameters"]), f"{row['rate']:g}" + (" (border)" if row["rate_at_border"] else ""),
                 show(row["mean"]), show(row["spread"], False), difference(row, task),
                 *(show(row["seeds"].get(seed), seed in row["seeds"]) for seed in seeds),
                 *([plus_minus(row["bleu"], row["bleu_spread"], 1)] if task == "e2e" else []), fixed(row["seconds"], 0)]
                for row in mine]
        parts.append(f"### {budget.capitalize()} budget ({share_of(budget)})\n\n" + table(head, body))
    if any(row["mean"] is not None for row in rows):
        title = f"{word.capitalize()} on dev against parameters"
        name = save(drawings / f"{task}.svg", against_parameters(title, rows, lambda value: f"{value:.3f}"))
        parts.append(f"![{title}; a line a candidate, whiskers of one standard deviation]({drawings.name}/{name})")
    for row in rows:
        if row["ranks"] and row["budget"] == RANKS_SHOWN:
            title = f"Final ranks of {row['candidate']}, {row['budget']} budget, first seed"
            name = save(drawings / f"ranks-{task}-{row['candidate']}.svg", ranks_of_groups(title, row["ranks"]))
            parts.append(f"![{title}]({drawings.name}/{name})")
    return "\n\n".join(parts)


def depth_block(records: Sequence[dict[str, Any]], drawings: Path) -> str:
    """A table and a heat map a task and source."""
    parts = []
    for record in records:
        title = f"{record['depth']}: {record['source']}"
        sizes = list(next((group["input"] for group in record["groups"] if group["layers"]), {}))
        head = ["group", "out x in", "layers", "rho", "1/n", "mean cosine", *(f"input {size} (chance)" for size in sizes),
                *(f"output {size} (chance)" for size in sizes), *(f"own {size}" for size in sizes)]
        body = [[group["group"], f"{group['d_out']} x {group['d_in']}", str(group["layers"]), fixed(group["rho"], 3),
                 fixed(1 / group["layers"], 3), fixed(group["cosine"], 4),
                 *(f"{fixed(group[side][size], 2)} ({fixed(group[f'{side}_chance'][size], 2)})"
                   for side in ("input", "output") for size in sizes), *(fixed(group["own"][size], 2) for size in sizes)]
                for group in record["groups"] if group["layers"]]
        name = save(drawings / f"depth-{record['depth']}-{record['source'].replace(' ', '-')}.svg",
                    shared_energy(f"Energy inside one common subspace, {title}", record["groups"]))
        parts.append(f"### {title}\n\n{table(head, body)}\n\n![Energy inside one common subspace]({drawings.name}/{name})")
    return "\n\n".join(parts)


def steps_block(rows: Sequence[dict[str, Any]], drawings: Path) -> str:
    """One table, the ratios against LoRA of the same side, and bars."""
    head = ["entry", "rank", "parameters (start, end)", "against", "time ratio", "first and last round", "floor ratio",
            "counted operations (first, last step)", "peak memory, MiB"]
    body = [[row["entry"], str(row["rank"]), pair_of_counts(row), row["against"], fixed(row.get("ratio"), 2),
             pair(row.get("ratios"), 2), fixed(row.get("floor_ratio"), 2),
             pair([row.get("counted_ratio_first"), row.get("counted_ratio_last")], 2),
             fixed(None if row.get("peak_memory_bytes") is None else row["peak_memory_bytes"] / 2**20, 0)] for row in rows]
    compared = [row for row in rows if "ratio" in row and row["entry"] != row["against"]]
    drawn = ""
    if compared:
        drawn = f"\n\n![Step time relative to LoRA]({drawings.name}/{save(drawings / 'steps.svg', step_times(compared))})"
    return table(head, body) + drawn


# ---- words ----------------------------------------------------------------------------------------------------------

def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def settings_of(candidate: str) -> str:
    """A candidate's settings without its method's name."""
    return ", ".join(f"{key}: {value}" for key, value in candidate_named(candidate).items() if key != "method") or UNKNOWN


def share_of(budget: str) -> str:
    """A budget in words."""
    return f"as many parameters as LoRA rank {BUDGETS[budget]:g} on all linears of the blocks, the head not counted"


def difference(row: dict[str, Any], task: str) -> str:
    """The paired difference to LoRA, with its standard deviation over seeds."""
    scale, places = (100, 2) if task == "sst2" else (1, 4)
    if row["difference"] is None:
        return UNKNOWN
    spread = UNKNOWN if row["difference_spread"] is None else f"{row['difference_spread'] * scale:.{places}f}"
    return f"{row['difference'] * scale:+.{places}f} ± {spread}"


def percent(value: float | None, tried: bool = True) -> str:
    """A fraction in percent; a run without a figure diverged."""
    return f"{100 * value:.2f}" if value is not None else "diverged" if tried else UNKNOWN


def loss(value: float | None, tried: bool = True) -> str:
    """A loss; a run without a figure diverged."""
    return f"{value:.4f}" if value is not None else "diverged" if tried else UNKNOWN


def fixed(value: float | None, places: int) -> str:
    """A number with so many places."""
    return UNKNOWN if value is None else f"{value:.{places}f}"


def whole(value: float | None) -> str:
    """A count."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def pair_of_counts(row: dict[str, Any]) -> str:
    """Parameters at the start and at the end."""
    return f"{whole(row['started_parameters'])}, {whole(row['final_parameters'])}"


def plus_minus(value: float | None, spread: float | None, places: int) -> str:
    """A mean and its standard deviation."""
    return fixed(value, places) + ("" if spread is None else f" ± {spread:.{places}f}")


def pair(values: Sequence[float | None] | None, places: int) -> str:
    """The first and the last of some numbers."""
    return UNKNOWN if not values else f"{fixed(values[0], places)}, {fixed(values[-1], places)}"
