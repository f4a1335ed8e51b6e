"""Labels: their names in a fixed order, weights of classes, and a split that keeps every class on both sides."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from deltaloom.data.rows import ImageRow, Row, TextRow, TokensRow
from deltaloom.errors import DataError, listed


@dataclass(frozen=True)
class LabelMap:
    """Names of classes; a name's place in the list is its number in the model's output."""

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names) or not all(isinstance(name, str) for name in self.names):
            raise DataError("a list of labels needs different names, at least one", got=list(self.names))

    @classmethod
    def of(cls, labels: Iterable[str]) -> Self:
        """The map of the labels that occur, in an order that does not depend on the rows': numbers by size, names by letters."""
        found = set(labels)
        numeric = all(name.isascii() and name.removeprefix("-").isdigit() for name in found)
        return cls(tuple(sorted(found, key=lambda name: (int(name), name)) if numeric else sorted(found)))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The map that `to_json` wrote.

        Raises:
            DataError: not a JSON list of names.
        """
        try:
            names = json.loads(text)
        except (ValueError, RecursionError):
            names = None
        if not isinstance(names, list):
            raise DataError("labels must be a JSON list of names", got=text[:80])
        return cls(tuple(names))

    def to_json(self) -> str:
        """A JSON list of the names in order."""
        return json.dumps(list(self.names), ensure_ascii=False)

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """The number of a name."""
        return self._numbers[name]

    def indices(self, names: Iterable[str]) -> list[int]:
        """The numbers of names."""
        return [self._numbers[name] for name in names]

    @cached_property
    def _numbers(self) -> Mapping[str, int]:
        return {name: index for index, name in enumerate(self.names)}


def labels_of(row: Row) -> tuple[str, ...]:
    """The class names that a row carries: none, one, or one for each word."""
    if isinstance(row, TokensRow):
        return row.tags or ()
    if isinstance(row, (TextRow, ImageRow)) and isinstance(row.label, str):
        return (row.label,)
    return ()


def counts(rows: Iterable[Row]) -> dict[str, int]:
    """How often each class name occurs, most frequent first."""
    found = Counter(name for row in rows for name in labels_of(row))
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def check_known(rows: Iterable[Row], labels: LabelMap, known_from: str = "the training rows") -> None:
    """Check that rows carry no label beyond `labels`.

    Raises:
        DataError: names the labels and their first places.
    """
    known = set(labels.names)
    places: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for name in labels_of(row):
            if name not in known:
                places[name].append(row.where)
    if places:
        problems = [f"'{name}' in {len(where)} place{'s'[:len(where) > 1]}: {listed(dict.fromkeys(where), 5)}"
                    for name, where in sorted(places.items())]
        raise DataError(f"labels that {known_from} do not have", legal=labels.names, problems=problems,
                        hint="Correct or leave out these rows, or train with rows of these labels.")


def balanced_weights(rows: Iterable[Row], labels: LabelMap) -> tuple[float, ...]:
    """A weight for each class, inverse to its frequency: rows / (classes * rows of the class), so that the mean row weighs 1."""
    found = counts(rows)
    total = sum(found.values())
    return tuple(total / (len(labels) * found[name]) if found.get(name) else 0.0 for name in labels.names)


def split(rows: Sequence[Row], fraction: float, seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Training and evaluation rows in their old order; the latter are about `fraction` of all, at random by `seed`.

    Classes keep their shares, and each with two rows or more is on both sides. Rows of a class with the same source stay
    together, so that no evaluation row was trained on, unless the class has nothing else.

    Raises:
        DataError: fewer than two rows.
    """
    if len(rows) < 2:
        raise DataError("splitting rows for evaluation needs at least two", got=len(rows), hint="Name an eval file instead.")
    generator = random.Random(f"split {seed}")
    classes: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        classes[() if isinstance(row, TokensRow) else labels_of(row)].append(index)
    held: set[int] = set()
    debt = 0.0  # what rounding owes, carried from class to class so that many small classes still give the fraction
    for _, members in sorted(classes.items()):
        want = len(members) * fraction + debt
        most = len(members) - 1
        count = min(max(round(want), 1), most)
        taken = _hold(rows, members, count, generator)
        debt = want - len(taken)
        held.update(taken)
    return (tuple(row for index, row in enumerate(rows) if index not in held),
            tuple(row for index, row in enumerate(rows) if index in held))


def _hold(rows: Sequence[Row], members: list[int], count: int, generator: random.Random) -> set[int]:
    """About `count` members, whole groups of equal sources where that leaves something on both sides."""
    if count < 1:
        return set()
    groups: dict[str, list[int]] = defaultdict(list)
    for index in members:
        groups[rows[index].source].append(index)
    units = list(groups.values()) if len(groups) > 1 else [[index] for index in members]
    generator.shuffle(units)
    held: set[int] = set()
    for unit in units[:-1]:
        if len(held) >= count:
            break
        held.update(unit)
    return held
