"""What a party's guards are worth, in words and as a table: for the terminal, and for the page of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltaloom.report import text
from deltaloom.report.reading import as_count, as_mapping, as_number, as_rows, as_text
from deltaloom.report.tables import Privacy

COLUMNS = ("what crosses", "counted", "what it is about", "releases", "mu", "epsilon")
UNITS = {
    "one release": "one row, sent once",
    "row": "one row, over all its releases",
    "text": "one text, over all its rows",
    "all rows": "everything that was sent",
}
SCOPES = {"run": "this run", "folder": "all runs of this folder"}
Found = Mapping[str, Any]


def privacy_of(found: Found) -> Privacy | None:
    """The facts of an `events.Privacy` record, read with distrust; None if there are none."""
    if not found:
        return None
    lines = [(as_text(row.get("crossing"), 100), SCOPES.get(as_text(row.get("scope")), as_text(row.get("scope"), 100)),
              UNITS.get(as_text(row.get("unit")), as_text(row.get("unit"), 100)), text.count(as_count(row.get("releases"))),
              _worth(row), _epsilon(row)) for row in _shown(as_rows(found.get("rows")))]
    ways = found.get("unpromised")
    said = [as_text(way, 500) for way in ways[:20]] if isinstance(ways, list) else []
    return Privacy(found.get("promised") is True, as_number(found.get("delta")), tuple(lines), tuple(said))


def privacy_text(found: Found) -> str:
    """The table and what is not promised; one sentence where nothing is."""
    facts = privacy_of(found)
    if facts is None or not facts.promised:
        return "\n".join(["Privacy: nothing is promised; no guard draws noise.",
                          *(f"  open: {way}" for way in (facts.unpromised if facts else ()))])
    title = f"What the guards promise, at delta {text.figure(facts.delta)}"
    return "\n".join([text.table_text(COLUMNS, facts.rows, title), *(f"  NOT promised: {way}" for way in facts.unpromised)])


def promise_text(found: Found) -> str:
    """What is said before anything leaves: what one release of a row is worth, and what stays open."""
    first = [as_mapping(row) for row in as_rows(found.get("rows")) if row.get("unit") == "one release"]
    if not first:
        return privacy_text(found)
    lines = [f"Privacy: each release of a row of {as_text(row.get('crossing'), 100)} costs mu {_worth(row)}, epsilon "
             f"{_epsilon(row)} at delta {text.figure(as_number(found.get('delta')))}; releases add up, the end states the sums."
             for row in first]
    return "\n".join([*lines, *(f"  NOT promised: {as_text(way, 500)}" for way in found.get("unpromised", ()))])


def _shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the lines of the folder that say what those of the run say."""
    known = {_said(row) for row in rows[:100] if row.get("scope") == "run"}
    return [row for row in rows[:100] if row.get("scope") == "run" or _said(row) not in known]


def _said(row: Found) -> tuple[object, ...]:
    return (as_text(row.get("crossing"), 100), as_text(row.get("unit"), 100),
            *(as_number(row.get(key)) for key in ("releases", "mu", "eta")))


def _worth(row: Found) -> str:
    mu, eta = as_number(row.get("mu")) or 0.0, as_number(row.get("eta")) or 0.0
    said = [text.figure(mu)] if mu or not eta else []
    return " and ".join([*said, *([f"eta {text.figure(eta)} per unit of distance"] if eta else [])])


def _epsilon(row: Found) -> str:
    epsilon = as_number(row.get("epsilon"))
    return "none can be stated" if epsilon is None else text.figure(epsilon)
