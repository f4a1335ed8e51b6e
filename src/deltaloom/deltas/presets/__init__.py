"""Presets: well-known combinations as plain lists of methods. This folder is the registry, one YAML file each.

    deltas: [{preset: NAME}]                      the list of the file
    deltas: [{preset: NAME, METHOD: {...}}]       with other settings for the list's entry of that method

A preset is gone once it is read: the resolved run file and the saved delta hold the list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deltaloom.errors import SettingsError, did_you_mean, listed

KEY = "preset"
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Preset:
    """A preset as its file describes it; `deltas` are entries as a run file has them."""

    name: str
    summary: str
    text: str
    deltas: tuple[dict[str, Any], ...]


def preset_names() -> list[str]:
    """The names of all presets, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        SettingsError: there is none.
    """
    legal = preset_names()
    if name not in legal:
        raise SettingsError("unknown preset", got=name, legal=legal, hint=did_you_mean(str(name), legal))
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return Preset(name, values["summary"], values["text"].strip(), tuple(values["deltas"]))


def expanded(entries: Sequence[Mapping[str, Any]], where: str = "deltas") -> list[tuple[str, dict[str, Any]]]:
    """(key path, entry) of every entry, with each preset replaced by its list; `where` is the key path that errors name.

    Raises:
        SettingsError: no such preset, or settings for a method that it does not have.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    for index, entry in enumerate(entries):
        place = f"{where}.{index}"
        plain = KEY not in entry or "method" in entry
        found += [(place, dict(entry))] if plain else [(place, each) for each in _list(entry, place)]
    return found


def _list(entry: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    given = {key: value for key, value in entry.items() if key != KEY}
    try:
        own = preset(entry[KEY]).deltas
    except SettingsError as error:
        raise SettingsError(f"{place}: {error}") from None
    legal = [_innermost(each)["method"] for each in own]
    wrong = [f"{key}: {value!r}" for key, value in given.items() if key not in legal or not isinstance(value, dict)]
    if wrong:
        raise SettingsError(f"{place}: a preset takes a mapping of settings for each of its methods", got=listed(wrong, 4),
                            legal=legal,
                            hint=f"For example: {{{KEY}: {entry[KEY]}, {legal[0]}: {{...}}}}; or write out its list.")
    return [_with(each, given.get(name, {})) for each, name in zip(own, legal, strict=True)]


def _innermost(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record of the method itself, also where another wraps it."""
    inner = entry.get("delta")
    return entry if inner is None else _innermost(inner)


def _with(entry: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    inner = entry.get("delta")
    return {**entry, **settings} if inner is None else {**entry, "delta": _with(inner, settings)}
