"""The run file: one YAML mapping that says everything about a run, its overrides, and where each value came from.

Every section is parsed by the part that reads it; this file knows only their names.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from deltaloom.errors import SettingsError, did_you_mean, listed
from deltaloom.search.space import open_places
from deltaloom.settings import Settings

LIMIT = 1_000_000  # bytes of a run file; anything larger is not one
MOST_VALUES, DEEPEST = 100_000, 50  # of a run file: YAML's aliases can blow a short text up without end
# What PyYAML's constructors raise on malformed values (an impossible date, a number without digits, a bad !!tag).
MALFORMED = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError)


class LogSettings(Settings):
    """Where else the events go."""

    tensorboard: bool = Field(False, description="also write TensorBoard files into the run folder")


class RunFile(Settings):
    """The top level of a run file; sections are mappings that their own part checks."""

    model: str
    task: str | None = None
    data: dict[str, Any]
    deltas: tuple[dict[str, Any], ...] = ()
    train: dict[str, Any] = Field(default_factory=dict)
    strategy: dict[str, Any] | None = None
    budget: dict[str, Any] = Field(default_factory=dict)
    base: dict[str, Any] = Field(default_factory=dict)
    private: dict[str, Any] = Field(default_factory=dict)
    log: LogSettings = LogSettings()
    seed: int = Field(0, ge=0, lt=2**31)
    output: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _nothing_for_other_commands(cls, values: Any) -> Any:
        places = open_places(values) if isinstance(values, dict) else []
        if places or (isinstance(values, dict) and "search" in values):
            raise ValueError("search: values of this run file are open or say how to search"
                             + (f" ({listed(places)})" if places else "") + ". `deltaloom search RUN.yaml` tries them out and "
                             "writes best.yaml, a run file whose values are settled")
        if isinstance(values, dict) and "compress" in values:
            raise ValueError("compress: a run trains a model as it is. Compress first with a run file of its own, "
                             "`deltaloom compress RUN.yaml`, then write model: DIR with the folder it made")
        return values


@dataclass(frozen=True)
class Run:
    """A parsed run file: its settings, the folder that relative data paths start at, and the origin of each given value."""

    file: RunFile
    base: Path
    origins: dict[str, str]  # dotted key -> "file" or "flag"
    name: str


def read_run_file(path: Path, overrides: list[str] | None = None) -> Run:
    """A run file with `key.path=value` overrides applied (values are YAML).

    Raises:
        SettingsError: no file, no YAML mapping, an unknown key, an override that cannot be applied.
    """
    values = read_mapping(path, RunFile.model_fields)
    values.pop("origins", None)  # a resolved run file of an earlier run may be run again
    return parse_run(values, overrides or [], base=path.resolve().parent, name=path.stem)


def read_mapping(path: Path, legal: Iterable[str]) -> dict[str, Any]:
    """The mapping of a YAML file, unchecked; `legal` are the keys that errors name.

    Raises:
        SettingsError: no file, or no YAML mapping.
    """
    values = read_yaml(_read(path), path.name)
    if not isinstance(values, dict):
        raise SettingsError(f"{path.name} must hold a mapping of keys to values", got=type(values).__name__,
                            legal=legal, hint="`deltaloom init` writes a starter run file.")
    return values


def parse_run(values: dict[str, Any], overrides: Sequence[str] = (), *, base: Path, name: str = "run") -> Run:
    """A run from a mapping, as a library user or `read_run_file` has it; the mapping stays as it is.

    Raises:
        SettingsError: an unknown key, an override that cannot be applied.
    """
    try:
        values = plain(values)
    except MALFORMED as error:
        raise SettingsError(f"run: {error or type(error).__name__}") from None
    origins = dict.fromkeys(_leaves(values), "file")
    for override in overrides:
        key = apply_override(values, override)
        origins = {k: v for k, v in origins.items() if not k.startswith(key + ".")} | {key: "flag"}
    return Run(RunFile.parse(values, "run file"), base, origins, name)


def apply_override(values: dict[str, Any], override: str, legal: Iterable[str] = tuple(RunFile.model_fields)) -> str:
    """Set `a.b.0.c=value` in place and give back the key, whose first part is one of `legal`; missing mappings are made."""
    key, sign, text = override.partition("=")
    key = key.strip()
    if not sign or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise SettingsError("an override has the form key.path=value", got=override,
                            hint="For example: -s train.learning_rate=5e-4")
    value = read_yaml(text, f"the value of the override '{key}'")
    place: Any = values
    parts = key.split(".")
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if isinstance(place, list):
            if part not in map(str, range(len(place))):
                raise SettingsError(f"the override '{key}' names no entry of the list", got=part,
                                    legal=range(len(place)) if place else "none: the list is empty")
            if last:
                place[int(part)] = value
            place = place[int(part)]
        elif isinstance(place, dict):
            if last:
                place[part] = value
            elif not isinstance(place.get(part), (dict, list)):
                place[part] = {}
            place = place[part]
        else:
            raise SettingsError(f"the override '{key}' goes through a value that has no keys", got=part)
    if parts[0] not in legal:
        raise SettingsError("unknown key in an override", got=key, legal=legal, hint=did_you_mean(parts[0], legal))
    return key


class _Loader(yaml.SafeLoader):
    """YAML as a run file needs it: a key only once, and dates stay the text that they are."""

    yaml_implicit_resolvers = {first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]  # noqa: RUF012
                               for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping; a key that stands there twice is an error, because only one of its values could count."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key.value}' stands there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_yaml(text: str, where: str) -> Any:
    """The plain value (mappings, lists, text, numbers, true, false, null) of a YAML text; `where` is named by errors.

    Text such as 5e-4, which YAML 1.1 does not take for a number, becomes a float.

    Raises:
        SettingsError: not YAML, a key twice, something that is no plain value, or too much of it.
    """
    try:
        return _plain(yaml.load(text, _Loader), 0, [0])  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise SettingsError(f"{where}{line}: this is not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except MALFORMED as error:
        raise SettingsError(f"{where}: this is not valid YAML: {error or type(error).__name__}") from None


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of a mapping, without anything that YAML has and a run file has not.

    Raises:
        one of MALFORMED: something else is in it.
    """
    copy: dict[str, Any] = _plain(values, 0, [0])
    return copy


def _plain(value: Any, depth: int, seen: list[int]) -> Any:
    """The value without anything that YAML has and a run file has not."""
    seen[0] += 1
    if depth > DEEPEST or seen[0] > MOST_VALUES:
        raise ValueError(f"nested more than {DEEPEST} deep" if depth > DEEPEST else f"more than {MOST_VALUES} values")
    if isinstance(value, dict):
        odd = [key for key in value if not isinstance(key, str | int | float | bool | None)]
        if odd:
            raise ValueError(f"a key must be a word, got {odd[0]!r}")
        return {key if isinstance(key, str) else str(key): _plain(item, depth + 1, seen) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1, seen) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value):
        return float(value)
    if isinstance(value, str):
        value.encode()  # half a surrogate pair is no text; UnicodeEncodeError is a ValueError
    elif not isinstance(value, int | float | bool | None):
        raise ValueError(f"a value must be text, a number, a list or a mapping, got {type(value).__name__}")
    return value


def resolved_yaml(sections: dict[str, Any], origins: dict[str, str]) -> str:
    """The resolved run file: every value, defaults included, and where each came from."""
    known = {key: _origin(key, origins) for key in _leaves(sections)}
    return yaml.safe_dump({**sections, "origins": known}, sort_keys=False, allow_unicode=True, width=120)


def _origin(key: str, origins: dict[str, str]) -> str:
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return "default"


def _leaves(values: Any, prefix: str = "") -> list[str]:
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, (list, tuple)) else None
    if pairs is None:
        return [prefix]
    found = [leaf for key, value in pairs for leaf in _leaves(value, f"{prefix}.{key}" if prefix else str(key))]
    return found or ([prefix] if prefix else [])


def _read(path: Path) -> str:
    if not path.exists():
        raise SettingsError("there is no such run file", got=str(path), hint="`deltaloom init` writes a starter run file.")
    if path.is_dir():
        raise SettingsError("this is a folder, not a run file", got=str(path), hint="Name the YAML file.")
    if path.stat().st_size > LIMIT:
        raise SettingsError("this is too large for a run file", got=f"{path.stat().st_size} bytes", legal=f"up to {LIMIT} bytes")
    try:
        return path.read_text(encoding="utf-8-sig")
    except PermissionError:
        raise SettingsError("this run file cannot be read", got=str(path), hint="Its permissions forbid it.") from None
    except UnicodeDecodeError:
        raise SettingsError("this is not a text file", got=path.name, hint="A run file is YAML in UTF-8.") from None
