"""What a delta may know of the rows of a call: which places are real tokens, and where packed rows begin.

A layer sees vectors and no mask. A delta that looks at whole rows watches the module that is called with the mask; the tuned
model notes each call of it here, before the layers inside run, and activation checkpoints bring the note back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaloom.errors import RefusedError


@dataclass(frozen=True)
class Places:
    """One call: `mask` (batch, time) is True at real tokens, None where all are; `lengths` of the rows packed into one."""

    mask: Tensor | None = None
    lengths: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Note:
    """What is kept of a call, and comes back where a part of it runs again: places by module, choices by who made them."""

    places: Mapping[str, Places] = field(default_factory=dict)
    choices: Mapping[int, Tensor] = field(default_factory=dict)


class TextReader(nn.Module, ABC):
    """A module that several deltas share and that decides something for each row from its input text, before the layers run.

    `path`: the watched module whose calls it is shown; None: it is shown the inputs before prompts are put in front.
    """

    path: str | None = None

    @abstractmethod
    def read(self, embeds: Tensor, places: Places) -> None:
        """Take in the frozen input embeddings of a call, (batch, time, d_model), and which places are real tokens."""

    @abstractmethod
    def used(self) -> Tensor:
        """(rows, entries): what each row of the last call chose, as weights that sum to 1; detached."""


class BatchLayout:
    """The last call of each watched module; one object for all deltas of a tuned model."""

    def __init__(self) -> None:
        self.places: dict[str, Places] = {}
        self.choices: dict[int, Tensor] = {}  # what readers chose for the rows of the last call
        self.text: Tensor | None = None       # (batch, time): where the input text is, if the caller has said
        self.rows: Tensor | None = None  # the rows that a layer is working on, where rows have different deltas

    def watch(self, path: str) -> None:
        """Note the calls of the module at a path from now on."""
        self.places.setdefault(path, Places())

    @contextmanager
    def narrowed(self, rows: Tensor | None) -> Iterator[None]:
        """Some rows of the batch alone within a `with` block; None: all."""
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before

    def __getstate__(self) -> dict[str, Any]:
        """Without choices, which belong to a graph and cannot be copied."""
        return {**self.__dict__, "choices": {}}

    def note(self) -> Note:
        """What is known of the call that runs now."""
        return Note(dict(self.places), dict(self.choices))

    @contextmanager
    def set(self, note: Note) -> Iterator[None]:
        """What was known of another call within a `with` block."""
        before = self.places, self.choices
        self.places, self.choices = dict(note.places), dict(note.choices)
        try:
            yield
        finally:
            self.places, self.choices = before

    @contextmanager
    def reading(self, labels: Tensor, lengths: Sequence[int] | None = None) -> Iterator[None]:
        """Within the block the input text of a causal model's rows is what stands before their first label that counts.

        labels: (batch, time) with -100 where nothing is learned; `lengths` of the rows packed into one.
        """
        learned = labels != -100
        parts = [learned] if lengths is None else list(learned.split(list(lengths), 1))
        before, self.text = self.text, torch.cat([part.cumsum(1) == 0 for part in parts], 1)
        try:
            yield
        finally:
            self.text = before

    def choice(self, reader: TextReader) -> Tensor:
        """What a reader chose, (rows, ...), for the rows that are being worked on.

        Raises:
            RefusedError: the model was not called as a whole.
        """
        found = self.choices.get(id(reader))
        if found is None:
            raise RefusedError("a choice by the input text has not seen the text", legal="a call of the whole model",
                               hint="Call the model itself, with input_ids or inputs_embeds.")
        return found if self.rows is None or len(self.rows) > len(found) else found[self.rows.to(found.device)]

    def log_mean(self, path: str, logs: Tensor) -> Tensor:
        """log of the mean of exp(logs) over each row's real tokens: (batch, time) -> (rows, 1), a packed row being a row.

        A row without any real token counts as one whose tokens all are: what it gives is used nowhere, and must be finite.

        Raises:
            RefusedError: the places that were noted are not those of these values.
        """
        lengths, mask = self.places[path].lengths, self._mask(path)
        if lengths is not None:
            if logs.shape != (1, sum(lengths)):
                raise _misfit(path, tuple(logs.shape), (1, sum(lengths)))
            return torch.stack([part.logsumexp(0, keepdim=True) - _log(part.shape[0]) for part in logs[0].split(lengths)])
        if mask is None:
            return logs.logsumexp(1, keepdim=True) - _log(logs.shape[1])
        if mask.shape != logs.shape:
            raise _misfit(path, tuple(logs.shape), tuple(mask.shape))
        real = mask | ~mask.any(1, keepdim=True)
        return logs.masked_fill(~real, -torch.inf).logsumexp(1, keepdim=True) - real.sum(1, keepdim=True).log()

    def spread(self, path: str, values: Tensor) -> Tensor:
        """Values (rows, 1), one for each row, as they multiply tokens: (batch, 1), or (1, time) where rows are packed."""
        lengths = self.places[path].lengths
        if lengths is None:
            return values
        return values[:, 0].repeat_interleave(torch.tensor(lengths, device=values.device))[None]

    def _mask(self, path: str) -> Tensor | None:
        mask = self.places[path].mask
        return mask if mask is None or self.rows is None else mask[self.rows.to(mask.device)]


def _log(count: int) -> float:
    return float(torch.tensor(float(count)).log())


def _misfit(path: str, got: tuple[int, ...], legal: tuple[int, ...]) -> RefusedError:
    return RefusedError("a gate that averages over rows got other rows than the model was called with", got=str(got),
                        legal=f"{legal}, as the attention mask of '{path}'",
                        hint="Call the model as a whole, with a mask of (batch, time).")
