"""Reading what others wrote: files and values that may be cut, missing or hostile, turned into plain clean values."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from deltaloom.events import read_events
from deltaloom.report.text import printable

TEXT_LIMIT = 4000
_SECRET_KEY = re.compile(r"(^|[._\- ])(token|secret|password|passwd|passphrase|api[_\-]?key|credentials?)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{16})\b|://[^/\s:@]+:[^/\s@]+@")


def as_number(value: object) -> float | None:
    """The value if it is a finite number, else None (true and false are no numbers)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def as_count(value: object) -> int | None:
    """The value as a whole number, or None."""
    number = as_number(value)
    return None if number is None else round(number)


def as_text(value: object, most: int = TEXT_LIMIT) -> str:
    """Any value as clean text of at most `most` characters; what is cut is said."""
    if value is None:
        return ""
    if isinstance(value, str):
        text = value
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, int) and value.bit_length() > 256:
        text = "a number of more than 77 digits"  # Python refuses to write very long ones
    elif isinstance(value, (dict, list, tuple)):
        text = f"({len(value)} items)"
    else:
        text = str(value)
    text = printable(text)
    return text if len(text) <= most else f"{text[:most]} \u2026 ({len(text) - most:,} characters more)"


def as_mapping(value: object) -> dict[str, Any]:
    """The mapping with clean text keys, or an empty one."""
    return {as_text(key, 200): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def as_rows(value: object) -> list[dict[str, Any]]:
    """The mappings in a list, or none."""
    return [as_mapping(item) for item in value if isinstance(item, Mapping)] if isinstance(value, (list, tuple)) else []


def as_numbers(value: object) -> dict[str, float]:
    """The finite numbers of a mapping."""
    found = {key: as_number(item) for key, item in as_mapping(value).items()}
    return {key: number for key, number in found.items() if number is not None}


def secret_free(key: str, value: str) -> str:
    """The value, or a placeholder where key or value look like a password or an access token: a report is passed on."""
    hidden = value and (_SECRET_KEY.search(key) or _SECRET_VALUE.search(value))
    return "(hidden)" if hidden else value


def flattened(value: object, key: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Dotted key and value of every leaf; a list of plain values is one leaf. Lazy, so that a caller can stop a hostile file."""
    if isinstance(value, Mapping) and value and depth < 20:
        for name, item in value.items():
            yield from flattened(item, f"{key}.{as_text(name, 200)}" if key else as_text(name, 200), depth + 1)
    elif isinstance(value, (list, tuple)) and value and depth < 20:
        if any(isinstance(item, (Mapping, list, tuple)) for item in value):
            for index, item in enumerate(value):
                yield from flattened(item, f"{key}.{index}", depth + 1)
        else:
            shown = ", ".join(as_text(item, 200) for item in value[:100]) + (", \u2026" if len(value) > 100 else "")
            yield key, secret_free(key, f"[{shown}]")
    elif isinstance(value, (Mapping, list, tuple)):
        yield key, ("{}" if isinstance(value, Mapping) else "[]") if not value else as_text(value)
    else:
        yield key, secret_free(key, "null" if value is None else as_text(value, 1000))


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """The mapping in a JSON file; a missing, damaged or different file is an empty mapping and a note."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read: {as_text(_reason(error), 200)}")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} does not hold a JSON object")
    return as_mapping(value)


def read_yaml(path: Path, notes: list[str]) -> dict[str, Any]:
    """The mapping in a YAML file with every scalar as the text that the file has (nothing is converted or constructed)."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        notes.append(f"{path.name} cannot be read: {as_text(_reason(error), 200)}")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} does not hold a mapping")
    return as_mapping(value)


def read_event_records(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The records of the event file; a missing or unreadable file and unreadable lines are noted."""
    try:
        records = read_events(path)
        lines = sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
        return []
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read: {as_text(_reason(error), 200)}")
        return []
    if lines > len(records):
        notes.append(f"{path.name}: {lines - len(records):,} of {lines:,} lines are cut or are no events and were left out")
    return [as_mapping(record) for record in records]


def _reason(error: BaseException) -> str:
    """The reason without the path, which may tell about a machine."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return " ".join(str(error).split()).replace('in "<unicode string>", ', "at ") or type(error).__name__
