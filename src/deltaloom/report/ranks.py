"""What the events say of ranks while training, and the record beside a saved delta of how its layers resemble one another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltaloom.report.reading import as_count, as_mapping, as_number, as_rows, as_text, read_json
from deltaloom.report.tables import DepthRow, Points, RankGroup, RankHistory

MOST_CHANGES, MOST_GROUPS, MOST_ROWS, MOST_HISTORIES = 400, 40, 256, 4
MOST_RANK = 1_000_000
_RECORD = Path("delta", "delta.json")


def rank_histories(records: list[dict[str, Any]], missing: list[str]) -> tuple[RankHistory, ...]:
    """One history a controller: records whose rows are of one kind and that share a group belong together.

    Of several records of one step (a resumed run) the last counts; of more than `MOST_CHANGES` steps as many are taken, evenly
    and with the first and the last.
    """
    streams: list[tuple[str, set[str], dict[int, dict[str, Any]]]] = []
    for record in records:
        step, rows, names = as_count(record.get("step")), as_text(record.get("rows"), 40) or "row", set(_groups(record))
        if step is None or not names:
            continue
        stream = next((stream for stream in streams if stream[0] == rows and stream[1] & names), None)
        if stream is None:
            stream = (rows, set(), {})
            streams.append(stream)
        stream[1].update(names)
        stream[2].pop(step, None)
        stream[2][step] = record
    if len(streams) > MOST_HISTORIES:
        missing.append(f"only the ranks of the first {MOST_HISTORIES} of {len(streams):,} controllers are shown")
    return tuple(_history(rows, changes, missing) for rows, _, changes in streams[:MOST_HISTORIES])


def depth_rows(folder: Path, missing: list[str]) -> tuple[DepthRow, ...]:
    """The groups of a run's saved delta; none where no delta was saved or its record knows none."""
    if not (folder / _RECORD).is_file():
        return ()
    record = read_json(folder / _RECORD, missing)
    methods = as_rows(record.get("methods"))
    found = []
    groups = as_rows(record.get("groups"))
    for group in groups[:MOST_GROUPS]:
        layers, place, shape = as_count(group.get("layers")), as_count(group.get("method")), group.get("shape")
        sizes = [as_count(size) for size in shape[:2]] if isinstance(shape, list) else []
        method = as_mapping(methods[place].get("settings")) if place is not None and 0 <= place < len(methods) else {}
        ranks = _numbers(group.get("ranks"))
        row = DepthRow(as_text(method.get("method"), 100), as_text(group.get("role"), 100),
                       " \u00d7 ".join(f"{size:,}" for size in sizes if size is not None), layers or 0,
                       tuple(rank for value in ranks if (rank := _rank(value)) is not None),
                       as_number(group.get("rho")), as_number(group.get("residual")))
        if row.layers > 0 and (row.rho is not None or row.ranks or row.residual is not None):
            found.append(row)
    if len(groups) > MOST_GROUPS:
        missing.append(f"only the first {MOST_GROUPS} of {len(groups):,} groups of the saved delta are shown")
    return tuple(found)


def _groups(record: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys((*as_mapping(record.get("ranks")), *as_mapping(record.get("importance")))))


def _history(rows: str, changes: dict[int, dict[str, Any]], missing: list[str]) -> RankHistory:
    steps = sorted(changes)
    if len(steps) > MOST_CHANGES:
        steps = [steps[round(index * (len(steps) - 1) / (MOST_CHANGES - 1))] for index in range(MOST_CHANGES)]
    records = [changes[step] for step in steps]
    names = list(dict.fromkeys(name for record in records for name in _groups(record)))
    if len(names) > MOST_GROUPS:
        missing.append(f"only the ranks of the first {MOST_GROUPS} of {len(names):,} groups are shown")
    groups = []
    for name in names[:MOST_GROUPS]:
        ranks = [_numbers(as_mapping(record.get("ranks")).get(name)) for record in records]
        importance = [_numbers(as_mapping(record.get("importance")).get(name)) for record in records]
        height = max(len(row) for row in (*ranks, *importance))
        if height > MOST_ROWS:
            missing.append(f"only the first {MOST_ROWS} of {height:,} rows of the ranks of {as_text(name, 100)} are shown")
        if height:
            padded = range(min(height, MOST_ROWS))
            groups.append(RankGroup(
                name, tuple(tuple(_rank(row[index]) if index < len(row) else None for index in padded) for row in ranks),
                tuple(tuple(_score(row[index]) if index < len(row) else None for index in padded) for row in importance)))
    return RankHistory(rows, tuple(steps), tuple(groups), *(_curve(steps, records, key)
                                                            for key in ("parameters", "budget", "residual")))


def _numbers(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _rank(value: object) -> int | None:
    rank = as_count(value)
    return rank if rank is not None and 0 <= rank <= MOST_RANK else None


def _score(value: object) -> float | None:
    score = as_number(value)
    return score if score is not None and score >= 0 else None


def _curve(steps: list[int], records: list[dict[str, Any]], key: str) -> Points:
    values = [(float(step), as_number(record.get(key))) for step, record in zip(steps, records, strict=True)]
    return tuple((step, value) for step, value in values if value is not None)
