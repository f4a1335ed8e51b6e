"""What a run folder says, as plain tables: read with distrust, tolerant of an interrupted run, and open about what is missing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from deltaloom.errors import UsageError
from deltaloom.report.privacy import privacy_of
from deltaloom.report.ranks import depth_rows, rank_histories
from deltaloom.report.reading import (
    TEXT_LIMIT,
    as_count,
    as_mapping,
    as_number,
    as_numbers,
    as_rows,
    as_text,
    flattened,
    read_event_records,
    read_json,
    read_yaml,
    secret_free,
)
from deltaloom.report.tables import (
    ClassRow,
    DataFacts,
    FirstRow,
    Metric,
    Moment,
    Points,
    RunFacts,
    Sample,
    Setting,
    SiteRow,
    Sizes,
    UsageRow,
    WarningRow,
)
from deltaloom.report.text import figure

_LOWER_IS_BETTER = re.compile(r"loss|perplexity|error|(^|_)(mse|mae|rmse|wer|cer|nll|ppl|ece|brier)($|_)", re.IGNORECASE)
_MOST = {"samples": 40, "warnings": 200, "settings": 1000, "classes": 200, "sites": 300, "labels": 200, "actions": 200,
         "first_rows": 10, "groups": 60, "entries": 64, "choices": 4}
_DATA_PLACED = ("format", "rows", "eval_rows", "labels", "eval_labels", "label_order", "lengths", "first_rows", "warnings")

def read_run(folder: Path) -> RunFacts:
    """The facts of a run folder; what is missing or damaged is listed in `missing`, never guessed.

    Raises:
        UsageError: there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError("There is no run folder", got=str(folder),
                         hint="Give the folder that `deltaloom tune` wrote (its `output`).")
    missing: list[str] = []
    result = read_json(folder / "metrics.json", missing)
    run = read_yaml(folder / "run.yaml", missing)
    environment = read_json(folder / "environment.json", missing)
    records = read_event_records(folder / "events.jsonl", missing)
    kinds = _by_kind(records, missing)
    finished = kinds["Finished"]
    if records and not finished:
        missing.append("the run has no end: it was interrupted or still goes on")
    metrics, primary = _metrics(result)
    curves = _curves(kinds["Step"], missing)
    return RunFacts(
        name=as_text(folder.resolve().name, 200),
        task=as_text(result.get("task") or run.get("task"), 200),
        model=secret_free("model", as_text(result.get("model") or run.get("model"), 300)),
        methods=_methods(result, run),
        status=as_text(finished[-1].get("reason"), 200) if finished else "unfinished" if records else "unknown",
        metrics=metrics,
        primary=primary,
        sizes=_sizes(result, kinds),
        curves=curves,
        evaluations=_evaluations(kinds["Evaluated"]),
        best_step=_best_step(kinds["Evaluated"]),
        classes=_cut(_classes(result), "classes", missing),
        sites=_cut(_sites(kinds["Attached"]), "sites", missing),
        data=_data(kinds["DataRead"], missing),
        warnings=_cut(_warnings(kinds, result), "warnings", missing),
        samples=_cut(_samples(kinds["Sampled"]), "samples", missing),
        timeline=_cut(_timeline(kinds, records), "actions", missing),
        ranks=rank_histories(kinds["RankChanged"], missing),
        depth=depth_rows(folder, missing),
        settings=_settings(run, missing),
        environment=tuple(islice(flattened(environment), _MOST["settings"])),
        usage=_usage(kinds["Routed"], missing),
        missing=tuple(missing),
        privacy=privacy_of(kinds["Privacy"][-1] if kinds["Privacy"] else as_mapping(result.get("privacy"))),
    )


def _usage(records: list[dict[str, Any]], missing: list[str]) -> tuple[tuple[UsageRow, ...], ...]:
    """The tables of the last step that has some."""
    last = [record for record in records if record.get("step") == records[-1].get("step")]
    tables = []
    for record in last[:_MOST["choices"]]:
        rows = []
        for group in as_rows(record.get("groups")):
            shares = group.get("shares")
            numbers = [as_number(share) for share in shares[:_MOST["entries"]]] if isinstance(shares, list) else []
            count = as_count(group.get("rows"))
            if count is not None and numbers and None not in numbers:
                rows.append(UsageRow(as_text(group.get("by"), 40), as_text(group.get("name"), 200), count,
                                     tuple(share for share in numbers if share is not None)))
        wide = max((len(row.shares) for row in rows), default=0)
        tables.append(_cut([row for row in rows if len(row.shares) == wide], "groups", missing))
    return tuple(table for table in tables if table)


def _by_kind(records: list[dict[str, Any]], missing: list[str]) -> dict[str, list[dict[str, Any]]]:
    kinds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in (
        "DataRead", "Attached", "Sampled", "Started", "Step", "Evaluated", "Saved", "Warned", "RankChanged", "Routed", "Acted",
        "Privacy", "Finished")}
    unknown: Counter[str] = Counter()
    for record in records:
        kind = as_text(record["event"], 100)
        if kind in kinds:
            kinds[kind].append(record)
        else:
            unknown[kind] += 1
    missing.extend(f"{number:,} events of the kind {kind} are not shown here" for kind, number in unknown.most_common(20))
    return kinds


def _cut(rows: list[Any], name: str, missing: list[str]) -> tuple[Any, ...]:
    if len(rows) > _MOST[name]:
        missing.append(f"only the first {_MOST[name]:,} of {len(rows):,} {name.replace('_', ' ')} are shown")
    return tuple(rows[:_MOST[name]])


def _metrics(result: dict[str, Any]) -> tuple[tuple[Metric, ...], Metric | None]:
    after, before, majority = (as_numbers(result.get(key)) for key in ("metrics", "base_metrics", "majority"))
    intervals = as_mapping(result.get("intervals"))
    chosen = as_mapping(result.get("primary"))
    first = as_text(chosen.get("name"), 200)
    metrics = []
    for name in dict.fromkeys((*after, *before)):
        bounds = intervals.get(name)
        low, high = (as_number(bound) for bound in bounds) if isinstance(bounds, list) and len(bounds) == 2 else (None, None)
        higher = chosen.get("higher_is_better") is not False if name == first else not _LOWER_IS_BETTER.search(name)
        metrics.append(Metric(name, after.get(name), before.get(name), low, high, majority.get(name), higher))
    candidates = sorted(metrics, key=lambda metric: (metric.name != first, metric.value is None, not metric.higher_is_better))
    return tuple(metrics), candidates[0] if candidates else None


def _methods(result: dict[str, Any], run: dict[str, Any]) -> tuple[str, ...]:
    entries = as_rows(result.get("methods")) or as_rows(run.get("deltas"))
    names = [as_text(entry.get("method") or entry.get("from") or "unnamed", 100) for entry in entries[:20]]
    return tuple(dict.fromkeys(names))  # a settled choice has entries of one method for several places


def _sizes(result: dict[str, Any], kinds: dict[str, list[dict[str, Any]]]) -> Sizes:
    """From metrics.json; an interrupted run's from its events, as far as they go."""
    found: dict[str, Any] = {}
    if kinds["Attached"]:
        attached = kinds["Attached"][-1]
        found |= {"trainable_parameters": attached.get("delta_parameters"), "head_parameters": attached.get("head_parameters"),
                  "total_parameters": attached.get("total_parameters")}
    if kinds["Finished"]:
        found |= {"seconds": kinds["Finished"][-1].get("seconds"), "tokens": kinds["Finished"][-1].get("tokens")}
    elif kinds["Step"]:
        found |= {key: sum(as_number(record.get(key)) or 0.0 for record in kinds["Step"]) for key in ("seconds", "tokens")}
    exact = {"flops_per_token", "seconds", "tokens_per_second"}
    numbers: dict[str, Any] = {}
    for key in Sizes.__dataclass_fields__:
        value = result[key] if as_number(result.get(key)) is not None else found.get(key)
        numbers[key] = as_number(value) if key in exact else as_count(value)
    if numbers["tokens_per_second"] is None and numbers["tokens"] and (numbers["seconds"] or 0) > 0:
        numbers["tokens_per_second"] = numbers["tokens"] / numbers["seconds"]
    return Sizes(**numbers)


def _curves(steps: list[dict[str, Any]], missing: list[str]) -> dict[str, Points]:
    """Curves over optimizer steps; of a step that ran twice (a resumed run) the later record counts."""
    last: dict[int, dict[str, Any]] = {}
    for record in steps:
        number = as_count(record.get("step"))
        if number is not None:
            last[number] = record
    ordered = sorted(last.items())
    lost = sum(1 for _, record in ordered if as_number(record.get("loss")) is None)
    if lost:
        missing.append(f"{lost:,} of {len(ordered):,} steps have no finite loss")
    readers: dict[str, Callable[[dict[str, Any]], float | None]] = {"tokens_per_second": _speed}
    names = ("loss", "penalty", "learning_rate", "gradient_norm", "tokens_per_second", "padding", "memory_bytes", "floor_share")
    curves = {}
    for name in names:
        read = readers.get(name, lambda record, name=name: as_number(record.get(name)))
        points = tuple((float(step), value) for step, record in ordered if (value := read(record)) is not None)
        if points and not (name in ("penalty", "memory_bytes") and all(value == 0 for _, value in points)):
            curves[name] = points
    return curves


def _speed(record: dict[str, Any]) -> float | None:
    tokens, seconds = as_number(record.get("tokens")), as_number(record.get("seconds"))
    return None if tokens is None or seconds is None or seconds < 1e-9 or tokens < 0 else tokens / seconds


def _evaluations(records: list[dict[str, Any]]) -> dict[str, Points]:
    found: dict[str, dict[float, float]] = {}
    for record in records:
        step = as_number(record.get("step"))
        if step is None:
            continue
        for name, value in as_numbers(record.get("metrics")).items():
            if name in found or len(found) < 16:
                found.setdefault(name, {})[step] = value
    return {name: tuple(sorted(values.items())) for name, values in found.items()}


def _best_step(records: list[dict[str, Any]]) -> int | None:
    return next((as_count(record.get("step")) for record in reversed(records) if record.get("best") is True), None)


def _classes(result: dict[str, Any]) -> list[ClassRow]:
    rows = []
    for row in as_rows(result.get("per_class")):
        bounds = row.get("interval")
        low, high = (as_number(bound) for bound in bounds) if isinstance(bounds, list) and len(bounds) == 2 else (None, None)
        rows.append(ClassRow(as_text(row.get("label"), 200), as_number(row.get("precision")), as_number(row.get("recall")),
                             as_number(row.get("f1")), as_count(row.get("support")), low, high))
    return rows


def _sites(records: list[dict[str, Any]]) -> list[SiteRow]:
    rows = as_rows(records[-1].get("table")) if records else []
    return [SiteRow(as_text(row.get("method"), 200), _listed(row.get("target")), as_count(row.get("sites")),
                    as_count(row.get("parameters")), _listed(row.get("examples"))) for row in rows]


def _listed(value: object) -> str:
    return ", ".join(as_text(item, 200) for item in value[:20]) if isinstance(value, list) else as_text(value, 1000)


def _data(records: list[dict[str, Any]], missing: list[str]) -> DataFacts:
    if not records:
        return DataFacts()
    facts = as_mapping(records[-1].get("facts"))
    counts, held = as_numbers(facts.get("labels")), as_numbers(facts.get("eval_labels"))
    labels = [(name, round(counts.get(name, 0)), round(held.get(name, 0)) if held else None)
              for name in dict.fromkeys((*counts, *held))]
    order, first = facts.get("label_order"), facts.get("first_rows")
    lengths = as_mapping(facts.get("lengths"))
    others = {key: value for key, value in facts.items() if key not in _DATA_PLACED}
    if isinstance(others.get("vocabulary"), dict):  # which ids occur is for programs; a person reads how many
        others["vocabulary"] = others["vocabulary"].get("size")
    return DataFacts(
        as_text(facts.get("format"), 200), as_count(facts.get("rows")), as_count(facts.get("eval_rows")),
        _cut(labels, "labels", missing), tuple(as_text(name, 200) for name in order[:1000]) if isinstance(order, list) else (),
        tuple((key, figure(as_number(value))) for key, value in list(lengths.items())[:60]),
        tuple(islice(flattened(others), 100)) if others else (),
        _cut([_first_row(row) for row in first[:100]] if isinstance(first, list) else [], "first_rows", missing))


def _first_row(row: object) -> FirstRow:
    if not isinstance(row, dict):
        return FirstRow("", None, ((as_text(row, TEXT_LIMIT // 2), False),))
    parts = tuple((as_text(part.get("text")), part.get("learned") is True) for part in as_rows(row.get("segments"))[:50])
    return FirstRow(as_text(row.get("where"), 200), as_count(row.get("tokens")), parts, as_text(row.get("target"), 1000))


def _warnings(kinds: dict[str, list[dict[str, Any]]], result: dict[str, Any]) -> list[WarningRow]:
    """Grouped by kind, most frequent first; those of the data's facts and of metrics.json only where no event has the message."""
    counts: Counter[str] = Counter()
    messages: dict[str, dict[str, None]] = {}
    for record in kinds["Warned"]:
        kind = as_text(record.get("kind"), 200) or "warning"
        number = as_count(record.get("count"))
        counts[kind] += 1 if number is None else max(1, number)
        messages.setdefault(kind, {})[as_text(record.get("message"))] = None
    known = {message for group in messages.values() for message in group}
    of_data = as_mapping(kinds["DataRead"][-1].get("facts")).get("warnings") if kinds["DataRead"] else None
    for item in (*_items(of_data), *_items(result.get("warnings"))):
        entry = as_mapping(item) or {"message": item}
        message, kind = as_text(entry.get("message")), as_text(entry.get("kind"), 200) or "warning"
        if message and message not in known:
            known.add(message)
            counts[kind] += max(1, as_count(entry.get("count")) or 1)
            messages.setdefault(kind, {})[message] = None
    return [WarningRow(kind, tuple(list(messages[kind])[:5]), number) for kind, number in counts.most_common()]


def _items(value: object) -> list[Any]:
    return value[:1000] if isinstance(value, list) else []


def _samples(records: list[dict[str, Any]]) -> list[Sample]:
    last = {as_text(record.get("row"), 50): record for record in records}
    texts = ("input", "reference", "before", "after")
    return [Sample(row, *(as_text(record.get(key)) for key in texts)) for row, record in last.items()]


def _timeline(kinds: dict[str, list[dict[str, Any]]], records: list[dict[str, Any]]) -> list[Moment]:
    moments = []
    saved = kinds["Saved"][-10:]
    for record in records:
        step = as_count(record.get("step"))
        if record["event"] == "Started":
            total = as_count(record.get("total_steps"))
            plan = f"{total:,} steps planned" if total is not None else ""
            moments.append(Moment(step, "resumed" if step else "started", plan))
        elif record["event"] == "Acted":
            moments.append(Moment(step, as_text(record.get("action"), 200) or "acted", as_text(record.get("reason"), 1000)))
        elif record["event"] == "Saved" and any(record is other for other in saved):
            size = as_count(record.get("bytes"))
            name = re.split(r"[/\\]", as_text(record.get("path"), 1000).rstrip("/\\"))[-1]
            moments.append(Moment(step, "saved", name + (f", {size:,} bytes" if size is not None else "")))
        elif record["event"] == "Finished":
            moments.append(Moment(step, "ended", as_text(record.get("reason"), 200)))
    return moments


def _settings(run: dict[str, Any], missing: list[str]) -> tuple[Setting, ...]:
    origins = {key: as_text(value, 100) for key, value in as_mapping(run.get("origins")).items()}
    values = {key: value for key, value in run.items() if key != "origins"}
    leaves = list(islice(flattened(values), _MOST["settings"] + 1)) if values else []
    if len(leaves) > _MOST["settings"]:
        missing.append(f"only the first {_MOST['settings']:,} settings are shown")
    return tuple(Setting(key, value, _origin(key, origins)) for key, value in leaves[:_MOST["settings"]])


def _origin(key: str, origins: dict[str, str]) -> str:
    """The origin of a key (of a list, its first item's), else of the nearest section around it."""
    if f"{key}.0" in origins:
        return origins[f"{key}.0"]
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return ""
