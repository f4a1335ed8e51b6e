"""Which lane acts on which row: one `Routing` that all wrappers of a tuned model share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaloom.deltas._layout import BatchLayout, Note
from deltaloom.errors import RefusedError

Group = tuple[str | None, Tensor | None]  # a lane and the rows that it acts on; None: no lane, all rows


@dataclass(frozen=True)
class Stretch:
    """Rows start..stop of a batch, one after another, all of them a lane's."""

    lane: str | None
    start: int
    stop: int

    @property
    def rows(self) -> Tensor:
        """Their indices."""
        return torch.arange(self.start, self.stop)


class Routing:
    """Which lane acts on which row; the same object serves every wrapper and is seen again when checkpointing recomputes."""

    def __init__(self) -> None:
        self.lanes: str | tuple[str | None, ...] | None = None
        self.layout = BatchLayout()
        self._stretches: tuple[object, list[Stretch] | None] = (None, None)  # what they are of, and they

    def stretches(self) -> list[Stretch] | None:
        """The rows of each lane where lanes are given row by row and each one's rows lie together; else None."""
        if self._stretches[0] is not self.lanes:
            self._stretches = self.lanes, _stretches(self.lanes)
        return self._stretches[1]

    def groups(self, batch: int) -> list[Group]:
        """The lanes of a batch of that many rows, each with its rows.

        Raises:
            RefusedError: a lane per row was asked for and the batch has another number of rows.
        """
        if not isinstance(self.lanes, tuple):
            return [(self.lanes, None)]
        found = self.rows(self.lanes, batch)
        return [(found[0][0], None)] if len(found) == 1 else list(found)

    @staticmethod
    def rows(lanes: tuple[str | None, ...], batch: int) -> list[tuple[str | None, Tensor]]:
        """Each different lane of a batch with the indices of its rows; raises RefusedError if the numbers do not fit."""
        if len(lanes) != batch:
            raise RefusedError("the lanes given row by row do not fit the batch", got=batch, legal=f"{len(lanes)} rows")
        return [(name, torch.tensor([i for i, lane in enumerate(lanes) if lane == name])) for name in dict.fromkeys(lanes)]

    @contextmanager
    def set(self, lanes: str | tuple[str | None, ...] | None) -> Iterator[None]:
        """These lanes within a `with` block."""
        before, self.lanes = self.lanes, lanes
        try:
            yield
        finally:
            self.lanes = before

    def kept(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts for an activation checkpoint: its forward, and its running again with the lanes and the layout of now."""
        return nullcontext(), self._again(self.lanes, self.layout.note())

    @contextmanager
    def _again(self, lanes: str | tuple[str | None, ...] | None, note: Note) -> Iterator[None]:
        with self.set(lanes), self.layout.set(note):
            yield


def _stretches(lanes: str | tuple[str | None, ...] | None) -> list[Stretch] | None:
    if not isinstance(lanes, tuple):
        return None
    starts = [row for row, lane in enumerate(lanes) if row == 0 or lane != lanes[row - 1]]
    if len({lanes[start] for start in starts}) < len(starts):
        return None
    return [Stretch(lanes[start], start, stop) for start, stop in zip(starts, [*starts[1:], len(lanes)], strict=True)]


def lanes_of(names: Sequence[str | None] | str | None) -> str | tuple[str | None, ...] | None:
    """What `Routing.lanes` holds for a name, a list of a name per row, or None."""
    return names if names is None or isinstance(names, str) else tuple(names)
