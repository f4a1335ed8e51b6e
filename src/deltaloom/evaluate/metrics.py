"""Metrics as plain functions of arrays; numpy only. Fractions lie in 0..1; what is not defined is NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
Figures = Callable[[Mapping[str, np.ndarray]], dict[str, float]]


def bootstrap(arrays: Mapping[str, np.ndarray], figures: Figures, *, resamples: int = RESAMPLES,
              seed: int = 0) -> dict[str, tuple[float, float]]:
    """95% percentile intervals of every figure, resampling rows with replacement (Efron 1979).

    Resamples in which a figure is not defined are left out; an interval is NaN where it never is.
    """
    rows = len(next(iter(arrays.values())))
    generator = np.random.default_rng(seed)
    found: dict[str, list[float]] = {}
    for _ in range(resamples):
        chosen = generator.integers(0, rows, rows)
        for name, value in figures({key: array[chosen] for key, array in arrays.items()}).items():
            found.setdefault(name, []).append(value)
    return {name: _middle([value for value in values if math.isfinite(value)]) for name, values in found.items()}


def _middle(values: list[float]) -> tuple[float, float]:
    if not values:
        return math.nan, math.nan
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def ratio(part: float, whole: float) -> float:
    """part / whole, NaN where there is nothing to divide by."""
    return float(part) / float(whole) if whole else math.nan


def confusion(truth: np.ndarray, guess: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes) counts: true class by guessed class."""
    return np.bincount(truth * classes + guess, minlength=classes * classes).reshape(classes, classes)


def accuracy(truth: np.ndarray, guess: np.ndarray) -> float:
    """Share of equal entries."""
    return ratio(float((truth == guess).sum()), len(truth))


def f1_of(hits: float, guessed: float, actual: float) -> float:
    """Harmonic mean of precision and recall: 2 hits / (guessed + actual); 0 where there are no hits but something to find."""
    return 2 * hits / (guessed + actual) if guessed + actual else math.nan


def macro_f1(truth: np.ndarray, guess: np.ndarray, classes: int) -> float:
    """Mean F1 over the classes that occur among truths or guesses."""
    table = confusion(truth, guess, classes)
    both = table.sum(0) + table.sum(1)
    present = both > 0
    return float(np.mean(2 * table.diagonal()[present] / both[present])) if present.any() else math.nan


def class_table(truth: np.ndarray, guess: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and support of each class."""
    table = confusion(truth, guess, len(names))
    return [{"class": name, "precision": ratio(table[index, index], table[:, index].sum()),
             "recall": ratio(table[index, index], table[index].sum()),
             "f1": f1_of(table[index, index], table[:, index].sum(), table[index].sum()), "support": int(table[index].sum())}
            for index, name in enumerate(names)]


def pearson(truth: np.ndarray, guess: np.ndarray) -> float:
    """Linear correlation; NaN where one side does not vary."""
    x, y = truth - truth.mean(), guess - guess.mean()
    size = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return float((x * y).sum()) / size if size > 0 else math.nan


def spearman(truth: np.ndarray, guess: np.ndarray) -> float:
    """Correlation of ranks, equal values sharing their mean rank."""
    return pearson(ranks(truth), ranks(guess))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def is_bio(names: Sequence[str]) -> bool:
    """Whether tags mark entities: O, and B-TYPE or I-TYPE."""
    others = [name for name in names if name != "O"]
    return len(others) < len(names) and bool(others) and all(name[:2] in ("B-", "I-") and len(name) > 2 for name in others)


def entities(tags: Sequence[str | None]) -> set[tuple[str, int, int]]:
    """(type, first word, word behind the last) of the entities that BIO tags mark, read as conlleval does.

    An I- that follows no tag of its type begins an entity. None (a word that the model did not see) counts as O.
    """
    found: set[tuple[str, int, int]] = set()
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = (tag or "O").partition("-")
        if kind and not (mark == "I" and name == kind):
            found.add((kind, start, place))
            kind = ""
        if mark in ("B", "I") and not kind:
            kind, start = name, place
    return found
