"""The space of a search: values of a run file that are not settled yet.

    learning_rate: {log: [1.0e-4, 1.0e-2]}     # a number, uniform in its logarithm
    dropout: {uniform: [0, 0.3]}               # a number
    rank: {int: [1, 16]}                       # a whole number, both ends included
    deltas: {choice: [[{...}], [{...}, {...}]]}  # one of these; each may hold further such values, sampled only when it is chosen

A dimension's name is its key path (`train.learning_rate`, `deltas.0.rank`); below a choice it names the option too
(`deltas[lora].0.rank`), so that one name always means one set of values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deltaloom.errors import SettingsError

KINDS = ("log", "uniform", "int", "choice")
LABEL_LETTERS = 40

# Where a space makes no sense, and why; a key stands for everything below it.
FIXED = {
    "output": "trials have folders of their own",
    "task": "the metrics of two tasks cannot be compared",
    "log": "it changes nothing that is trained",
    "private": "it is for `deltaloom party`",
    "seed": "choosing the best of several seeds picks luck",
    "data.train": "trials on other rows cannot be compared",
    "data.eval": "trials scored on other rows cannot be compared",
    "data.eval_fraction": "trials scored on other rows cannot be compared",
    "data.max_rows": "trials scored on other rows cannot be compared",
    "data.max_length": "rows that are cut elsewhere are other rows",
    "data.format": "it is a fact of the files",
    "data.columns": "it is a fact of the files",
    "train.metric": "it says which trial is better",
}


@dataclass(frozen=True)
class Interval:
    """Numbers from `low` to `high`, both included; `kind`: log, uniform or int."""

    name: str
    kind: str
    low: float
    high: float


@dataclass(frozen=True)
class Option:
    """One option of a choice: what it is called, and its value, in which further dimensions may stand."""

    label: str
    value: Any


@dataclass(frozen=True)
class Choice:
    """One of several options; parameters hold its label."""

    name: str
    options: tuple[Option, ...]

    @property
    def labels(self) -> list[str]:
        """The names of the options."""
        return [option.label for option in self.options]

    def option(self, label: str) -> Option:
        """The option of that name.

        Raises:
            SettingsError: there is none.
        """
        for option in self.options:
            if option.label == label:
                return option
        raise SettingsError(f"{self.name} has no such option", got=label, legal=self.labels)


Dimension = Interval | Choice
Pick = Callable[[Dimension], Any]
"""The number of an interval, or the label of a choice's option."""


@dataclass(frozen=True)
class Space:
    """A run file with dimensions in it."""

    template: dict[str, Any]

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """All of them, conditional ones after what they depend on."""
        return tuple(_dimensions(self.template))

    def fill(self, pick: Pick) -> dict[str, Any]:
        """A run file without dimensions; `pick` is asked for those that count, in order."""
        return _filled(self.template, pick)

    def values(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The run file of these parameters.

        Raises:
            SettingsError: a parameter that counts is missing.
        """
        def pick(dimension: Dimension) -> Any:
            if dimension.name not in parameters:
                raise SettingsError("a setting of the space has no value", got=dimension.name, legal=sorted(parameters))
            return parameters[dimension.name]
        return self.fill(pick)

    def settings(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters as a person reads them: an option that is a plain value as this value."""
        plain = {(dimension.name, option.label): option.value for dimension in self.dimensions if isinstance(dimension, Choice)
                 for option in dimension.options if not isinstance(option.value, dict | list | Interval | Choice)}
        return {name: plain.get((name, value), value) if isinstance(value, str) else value for name, value in parameters.items()}

    @property
    def size(self) -> int | None:
        """How many different run files there are; None if there is no end of them."""
        return _size(self.template)

    def assignments(self, *, corners: bool = False) -> Iterator[dict[str, Any]]:
        """The parameters of every run file of a finite space, in order; `corners`: of intervals only the two ends.

        Raises:
            SettingsError: the space is not finite.
        """
        path: list[int] = []  # which candidate each dimension takes, in order; those beyond its end take the first
        while True:
            taken: list[tuple[int, int]] = []  # (place, how many candidates there are)
            yield self.drawn(_follower(path, taken, corners))
            while taken and taken[-1][0] + 1 == taken[-1][1]:
                taken.pop()
            if not taken:
                return
            path = [place for place, _ in taken]
            path[-1] += 1

    def drawn(self, pick: Pick) -> dict[str, Any]:
        """The parameters of the run file that `fill` makes."""
        parameters: dict[str, Any] = {}
        self.fill(lambda dimension: parameters.setdefault(dimension.name, pick(dimension)))
        return parameters

    def described(self) -> dict[str, Any]:
        """Each dimension by name, as plain values: what makes two spaces the same."""
        found: dict[str, Any] = {}
        for dimension in self.dimensions:
            if isinstance(dimension, Interval):
                found[dimension.name] = {dimension.kind: [dimension.low, dimension.high]}
            else:
                found[dimension.name] = {"choice": {option.label: _written(option.value) for option in dimension.options}}
        return found

    def values_as_written(self) -> dict[str, Any]:
        """The run file with its open values, which `parse_space` reads."""
        written: dict[str, Any] = _written(self.template)
        return written

    def fixed(self) -> dict[str, Any]:
        """The settled values by key path."""
        return dict(_leaves(self.template, ""))


def parse_space(values: Mapping[str, Any]) -> Space:
    """The space of a run file; the mapping stays as it is.

    Raises:
        SettingsError: no value is open, or some are written wrongly, or stand where they make no sense; all of them.
    """
    problems: list[str] = []
    template = {key: _parsed(value, key, problems) for key, value in values.items()}
    if problems:
        raise SettingsError("the space is wrong", problems=problems)
    space = Space(template)
    if not space.dimensions:
        raise SettingsError("the space is empty: no value of the run file is open",
                            hint="For example: train: {learning_rate: {log: [1.0e-4, 1.0e-2]}}")
    return space


def open_places(values: Mapping[str, Any]) -> list[str]:
    """The key paths of a run file at which a space is written; faults in it do not matter."""
    return [name for key, value in values.items() if key not in ("log", "search") for name in _open(value, key)]


def kind_of(value: Any) -> str | None:
    """Which kind of dimension a value of a run file writes, if any: a mapping with one of the four words as its only key."""
    if isinstance(value, dict) and len(value) == 1:
        (key,) = value
        return key if key in KINDS else None
    return None


def _open(value: Any, path: str) -> list[str]:
    if kind_of(value):
        return [path]
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return [name for key, item in pairs for name in _open(item, f"{path}.{key}")]


def _parsed(value: Any, path: str, problems: list[str]) -> Any:
    kind = kind_of(value) if path not in ("log", "data.columns") else None
    if kind is None:
        if isinstance(value, dict):
            return {key: _parsed(item, f"{path}.{key}", problems) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [_parsed(item, f"{path}.{index}", problems) for index, item in enumerate(value)]
        return value
    reason = next((why for key, why in FIXED.items() if path == key or path.startswith(key + ".")), None)
    if reason is None and any(key.startswith(path + ".") for key in FIXED):
        reason = "it holds values that cannot be; open single values inside it"
    if reason is not None:
        problems.append(f"{path} cannot be searched: {reason}")
        return value
    given = value[kind]
    return _choice(path, given, problems) if kind == "choice" else _interval(path, kind, given, problems)


def _interval(path: str, kind: str, given: Any, problems: list[str]) -> Any:
    numbers = given if isinstance(given, list) else []
    if len(numbers) != 2 or not all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
        problems.append(f"{path}: {kind} takes two numbers [lowest, highest], got {given!r}")
        return None
    low, high = numbers
    if kind == "int" and (low != int(low) or high != int(high)):
        problems.append(f"{path}: int takes whole numbers, got {given!r}")
    elif kind == "log" and low <= 0:
        problems.append(f"{path}: log has no zero and nothing below it, got {given!r}")
    elif low >= high:
        problems.append(f"{path}: the lowest must be below the highest, got {given!r}")
    return Interval(path, kind, int(low), int(high)) if kind == "int" else Interval(path, kind, float(low), float(high))


def _choice(path: str, given: Any, problems: list[str]) -> Any:
    if not isinstance(given, list) or len(given) < 2:
        problems.append(f"{path}: choice takes a list of at least two options, got {given!r}")
        return None
    if len({json.dumps(option, sort_keys=True) for option in given}) < len(given):
        problems.append(f"{path}: choice has one option twice, got {given!r}")
        return None
    labels = [_label(option) for option in given]
    labels = [label if labels.count(label) == 1 else f"{label}#{index}" for index, label in enumerate(labels, 1)]
    if len(set(labels)) < len(labels):
        labels = [f"option#{index}" for index in range(1, len(labels) + 1)]
    return Choice(path, tuple(Option(label, _parsed_option(option, path, label, problems))
                              for label, option in zip(labels, given, strict=True)))


def _parsed_option(option: Any, path: str, label: str, problems: list[str]) -> Any:
    return _parsed(option, f"{path}[{label}]", problems)


def _label(option: Any) -> str:
    """A short name for an option: the methods of a list of deltas, the value itself where it is plain."""
    if isinstance(option, dict):
        own = option.get("method", option.get("from"))
        return own if isinstance(own, str) else _short(json.dumps(option, ensure_ascii=False))
    if isinstance(option, list):
        return _short("+".join(_label(item) for item in option)) or "none"
    return option if isinstance(option, str) else _short(json.dumps(option))


def _short(text: str) -> str:
    return text if len(text) <= LABEL_LETTERS else text[:LABEL_LETTERS - 1] + "\u2026"


def _filled(value: Any, pick: Pick) -> Any:
    if isinstance(value, Interval):
        return pick(value)
    if isinstance(value, Choice):
        return _filled(value.option(pick(value)).value, pick)
    if isinstance(value, dict):
        return {key: _filled(item, pick) for key, item in value.items()}
    return [_filled(item, pick) for item in value] if isinstance(value, list) else value


def _dimensions(value: Any) -> Iterator[Dimension]:
    if isinstance(value, Interval | Choice):
        yield value
    inside = ([option.value for option in value.options] if isinstance(value, Choice) else
              list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [])
    for item in inside:
        yield from _dimensions(item)


def _size(value: Any) -> int | None:
    if isinstance(value, Interval):
        return int(value.high - value.low) + 1 if value.kind == "int" else None
    if isinstance(value, Choice):
        sizes = [_size(option.value) for option in value.options]
        return None if None in sizes else sum(size for size in sizes if size is not None)
    inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    sizes = [_size(item) for item in inside]
    return None if None in sizes else math.prod(size for size in sizes if size is not None)


def _follower(path: list[int], taken: list[tuple[int, int]], corners: bool) -> Pick:
    """Picks the candidates that `path` says, and notes them in `taken`."""
    def pick(dimension: Dimension) -> Any:
        legal = _candidates(dimension, corners)
        place = path[len(taken)] if len(taken) < len(path) else 0
        taken.append((place, len(legal)))
        return legal[place]
    return pick


def _candidates(dimension: Dimension, corners: bool) -> list[Any]:
    if isinstance(dimension, Choice):
        return dimension.labels
    if corners:
        return [dimension.low, dimension.high]
    if dimension.kind != "int":
        raise SettingsError("a space that is tried out whole has no intervals of real numbers", got=dimension.name,
                            hint="Write {choice: [...]} or {int: [...]}, or take another sampler.")
    return list(range(int(dimension.low), int(dimension.high) + 1))


def _written(value: Any) -> Any:
    """A value with dimensions in it, as plain values."""
    if isinstance(value, Interval):
        return {value.kind: [value.low, value.high]}
    if isinstance(value, Choice):
        return {"choice": [_written(option.value) for option in value.options]}
    if isinstance(value, dict):
        return {key: _written(item) for key, item in value.items()}
    return [_written(item) for item in value] if isinstance(value, list) else value


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Interval | Choice):
        return
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        yield path, value
        return
    for key, item in pairs:
        yield from _leaves(item, f"{path}.{key}" if path else str(key))
