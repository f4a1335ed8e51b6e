"""What a delta is, from its files alone: neither torch nor the base is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltaloom.checkpoint.header import read_header, read_json
from deltaloom.checkpoint.record import RECORD, DeltaRecord, GroupFacts, delta_file_facts
from deltaloom.errors import CheckpointError
from deltaloom.report.text import byte_size, count, figure, rank_range, table_text

PEFT_CONFIG, PEFT_TENSORS = "adapter_config.json", "adapter_model.safetensors"
SHOWN = 40


def inspect(path: Path, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Parameters, bytes, ranks, norms, base and settings of a delta, and how much its layers' changes resemble one another.

    Raises:
        CheckpointError: there is no delta, or it is damaged.
    """
    for place in (path / "delta", path):
        if (place / RECORD).is_file():
            return _native(place, say)
    for place in (path / "delta", path):
        if (place / PEFT_CONFIG).is_file():
            return _peft(place, say)
    raise CheckpointError("there is no delta", got=str(path),
                          hint=f"Name a run folder, or a folder with {RECORD} or {PEFT_CONFIG}.")


def _native(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    facts = delta_file_facts(folder)
    record = facts.record
    say(f"Delta of {record.base.source or 'an unnamed model'} ({record.base.architecture}), task {record.base.task}")
    say(f"{count(facts.parameters)} parameters, {byte_size(facts.bytes)}; base fingerprint {record.base.fingerprint[:16]}")
    for method in record.methods:
        settings = ", ".join(f"{key} {value}" for key, value in method.settings.items() if key != "method")
        say(f"  {method.settings.get('method')}{' (head)' if method.head else ''} at {len(method.sites)} sites: {settings}")
    rows = [(site.site, count(site.parameters), "" if site.rank is None else str(site.rank),
             "" if site.norm is None else figure(site.norm)) for site in record.sites]
    rows[:0] = [(f"{shared.name} (shared)", count(shared.parameters), "", "") for shared in record.shared]
    say(table_text(("site", "parameters", "rank", "norm of the change"), rows[:SHOWN]))
    if len(rows) > SHOWN:
        say(f"... and {len(rows) - SHOWN} more; --json lists all")
    _say_groups(record, say)
    ranks = [site.rank for site in record.sites if site.rank is not None]
    return {"parameters": facts.parameters, "bytes": facts.bytes, "base": record.base.model_dump(),
            "methods": [{**m.settings, "sites": len(m.sites), "head": m.head} for m in record.methods],
            "rank": sum(ranks) / len(ranks) if ranks else None, "sites": [site.model_dump() for site in record.sites],
            "shared": [shared.model_dump() for shared in record.shared],
            "groups": [group.model_dump(mode="json") for group in record.groups],
            "format": "native", "labels": record.base.labels, "seed": record.seed}


def _say_groups(record: DeltaRecord, say: Callable[[str], None]) -> None:
    """The table of the groups of which something is known."""
    known = [group for group in record.groups if group.rho is not None or group.ranks or group.residual is not None]
    if not known:
        return
    say("How much the layers' changes resemble one another: rho is 1/N where they are unrelated, 1 where they are the same but "
        "for a factor.")
    several = len({group.method for group in known}) > 1
    say(table_text((*(("method",) if several else ()), "role", "shape", "layers", "mean rank", "rho", "1/N", "residual"),
                   [((_method_name(record, group),) if several else ()) + _cells(group) for group in known[:SHOWN]]))
    if len(known) > SHOWN:
        say(f"... and {len(known) - SHOWN} more; --json lists all")


def _cells(group: GroupFacts) -> tuple[str, ...]:
    return (group.role, f"{group.shape[0]} x {group.shape[1]}", str(group.layers), rank_range(group.ranks or []),
            figure(group.rho), figure(1 / group.layers), "" if group.residual is None else figure(group.residual))


def _method_name(record: DeltaRecord, group: GroupFacts) -> str:
    known = group.method < len(record.methods)
    return str(record.methods[group.method].settings.get("method")) if known else str(group.method)


def _peft(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    config = read_json(folder / PEFT_CONFIG)
    path = folder / PEFT_TENSORS
    if not path.is_file():
        raise CheckpointError(f"the folder holds {PEFT_CONFIG} and no {PEFT_TENSORS}", got=str(folder),
                              hint="Only safetensors are read; save the adapter again with safe_serialization=True.")
    header = read_header(path)
    parameters = sum(info.elements for info in header.tensors.values())
    size = header.file_bytes + (folder / PEFT_CONFIG).stat().st_size
    say(f"PEFT {config.get('peft_type')} of {config.get('base_model_name_or_path') or 'an unnamed model'}")
    say(f"{count(parameters)} parameters, {byte_size(size)}, {len(header.tensors)} tensors")
    return {"parameters": parameters, "bytes": size, "base": {"source": config.get("base_model_name_or_path")},
            "methods": [config], "rank": config.get("r"), "sites": sorted(header.tensors), "format": "peft"}
