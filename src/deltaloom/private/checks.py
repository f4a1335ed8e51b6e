"""What must hold of a request before anything is computed: sizes, places and labels that fit the back and one another."""

from __future__ import annotations

from torch import Tensor

from deltaloom.errors import RefusedError
from deltaloom.private.messages import BackFacts, Rows


def check_rows(rows: Rows, facts: BackFacts) -> None:
    """Raises RefusedError unless rows at the cut fit the back."""
    hidden, problems = rows.hidden, []
    if hidden.ndim != 2 or hidden.shape[-1] != facts.width or not hidden.is_floating_point():
        problems.append(f"hidden states {tuple(hidden.shape)} {hidden.dtype}: legal are floating (tokens, {facts.width})")
    elif not rows.lengths or min(rows.lengths) < 1 or sum(rows.lengths) != len(hidden):
        problems.append(f"lengths {_short(rows.lengths)}: each must be at least 1, and all together {len(hidden)}")
    if len(rows.offsets) != len(rows.lengths) or any(offset < 0 for offset in rows.offsets):
        problems.append(f"offsets {_short(rows.offsets)}: legal is one for each row, 0 or more")
    elif facts.max_length is not None:
        longest = max((sum(pair) for pair in zip(rows.lengths, rows.offsets, strict=True)), default=0)
        if longest > facts.max_length:
            problems.append(f"a row of {longest} tokens: the model allows {facts.max_length}")
    if rows.layout not in ("packed", "padded", "masked"):
        problems.append(f"layout {rows.layout!r}: legal are packed, padded, masked")
    if problems:
        raise RefusedError("these rows do not fit the back of the model", problems=problems)


def check_places(places: Tensor, rows: Rows, *, one_each: bool) -> None:
    """Raises RefusedError unless places lie within the rows; with `one_each`, one of every row, in order."""
    tokens = len(rows.hidden)
    whole = places.ndim == 1 and not places.dtype.is_floating_point
    if not whole or (len(places) and not 0 <= int(places.min()) <= int(places.max()) < tokens):
        raise RefusedError("places must be whole numbers within the rows", got=_short(places.flatten().tolist()),
                           legal=f"0 to {tokens - 1}")
    if not one_each:
        return
    ends, start = [], 0
    for length in rows.lengths:
        ends.append((start, start := start + length))
    found = places.tolist()
    if len(found) != len(ends) or any(not low <= place < high for place, (low, high) in zip(found, ends, strict=True)):
        raise RefusedError("a classifier reads one place of every row", got=_short(found), legal=f"{len(ends)} places, one a row")


def check_labels(labels: Tensor, places: Tensor, facts: BackFacts) -> None:
    """Raises RefusedError unless there is a legal label for every place."""
    if labels.shape != places.shape or labels.dtype.is_floating_point:
        raise RefusedError("there must be one whole number as label for every place", got=tuple(labels.shape),
                           legal=tuple(places.shape))
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < max(facts.outputs, 1):
        raise RefusedError("a label is outside of what the head knows", got=[int(labels.min()), int(labels.max())],
                           legal=f"0 to {facts.outputs - 1}")


def _short(values: object) -> str:
    text = str(values)
    return text if len(text) <= 80 else text[:77] + "..."
