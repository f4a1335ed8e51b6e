"""Checks of single fields of a header: what a value may be, and how that is said."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

MOST_INTEGER = 2 ** 48


@dataclass(frozen=True)
class Check:
    """Whether a value is legal, and which are."""

    legal: str
    holds: Callable[[Any], bool]


def whole(least: int = 0, most: int = MOST_INTEGER) -> Check:
    """An integer of a range."""
    return Check(f"an integer from {least} to {most}", lambda value: type(value) is int and least <= value <= most)


def whole_list(least: int = 0, most: int = MOST_INTEGER) -> Check:
    """A list of integers of a range."""
    one = whole(least, most)
    return Check(f"a list, each {one.legal}", lambda value: isinstance(value, list) and all(map(one.holds, value)))


def number(optional: bool = False) -> Check:
    """A finite float."""
    return Check("a finite number" + (" or nothing" if optional else ""),
                 lambda value: (optional and value is None) or (type(value) is float and math.isfinite(value)))


def numbers(optional: bool = False) -> Check:
    """A list of finite floats."""
    one = number()
    return Check("a list of finite numbers" + (" or nothing" if optional else ""),
                 lambda value: (optional and value is None) or (isinstance(value, list) and all(map(one.holds, value))))


def flag() -> Check:
    """True or false."""
    return Check("true or false", lambda value: type(value) is bool)


def word(*choices: str) -> Check:
    """One of some words."""
    return Check(" or ".join(choices), lambda value: type(value) is str and value in choices)


def name(pattern: str, most: int = 64, *, empty: bool = False) -> Check:
    """A short text of a pattern."""
    compiled = re.compile(pattern)
    return Check(f"up to {most} characters of {pattern}", lambda value: type(value) is str and len(value) <= most
                 and ((empty and not value) or compiled.fullmatch(value) is not None))


def text(most: int) -> Check:
    """Any text of a length."""
    return Check(f"a text of up to {most} characters", lambda value: type(value) is str and len(value) <= most)


def names(pattern: str, most: int = 16) -> Check:
    """A short list of short texts."""
    one = name(pattern)
    return Check(f"up to {most} of: {one.legal}",
                 lambda value: isinstance(value, list) and len(value) <= most and all(map(one.holds, value)))


def facts(most: int = 64, longest: int = 500) -> Check:
    """A small map of words to plain values."""
    key = name("[a-z][a-z0-9_-]*")

    def plain(value: object) -> bool:
        return value is None or type(value) in (bool,) or whole(-MOST_INTEGER).holds(value) or number().holds(value) \
            or (type(value) is str and len(value) <= longest)

    return Check(f"a map of up to {most} words to plain values", lambda value: isinstance(value, dict) and len(value) <= most
                 and all(key.holds(one) and plain(two) for one, two in value.items()))


def wrong(checks: dict[str, Check], record: dict[str, Any]) -> Iterable[tuple[str, Any, str]]:
    """The fields that are missing, unknown or illegal, each with its value and what is legal."""
    for field in sorted(set(record) - set(checks), key=str):
        yield str(field)[:64], "an unknown field", ", ".join(sorted(checks))
    for field, check in checks.items():
        if field not in record:
            yield field, "nothing", check.legal
        elif not check.holds(record[field]):
            yield field, repr(record[field])[:80], check.legal
