"""Where the loop's batches come from: a pure function of epoch and position, so that a resumed run sees the same ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from deltaloom.data.batches import Batch, dealt, micro_batches, plan_steps
from deltaloom.data.encode import Example
from deltaloom.train.settings import TrainSettings

MICRO_TOKENS = 2048  # tokens of a micro-batch with padding: larger ones are no faster on a CPU and take more memory
Collate = Callable[[Sequence[Example]], Batch]


class Feed(Protocol):
    """The training rows as optimizer steps."""

    def steps(self, epoch: int) -> Sequence[Sequence[Sequence[int]]]:
        """For each optimizer step of an epoch its micro-batches, as indices; the same for the same epoch, always."""

    def dealt(self, step: Sequence[Sequence[int]], number: int, size: int) -> Sequence[Sequence[int]]:
        """Of an optimizer step the micro-batches of process `number` of `size`; all of them have every index once."""

    def batch(self, indices: Sequence[int], device: torch.device) -> Batch:
        """A micro-batch on a device."""

    def place(self, row: int) -> str:
        """Where a row of `Batch.rows` comes from, for messages: file and line if they are known."""


class ExampleFeed:
    """A feed from encoded examples: `plan_steps` decides the order, `collate` makes the tensors."""

    def __init__(self, examples: Sequence[Example], collate: Collate, settings: TrainSettings, *, seed: int = 0,
                 micro_tokens: int = MICRO_TOKENS, place: Callable[[int], str] | None = None) -> None:
        self.examples = examples
        self.collate = collate
        self.settings = settings
        self.seed = seed
        self.micro_tokens = micro_tokens
        self._lengths = [example.length for example in examples]
        self._place = place

    def steps(self, epoch: int) -> list[list[list[int]]]:
        """One epoch in an order that the seed and the epoch alone decide."""
        return plan_steps(self._lengths, batch_size=self.settings.rows_per_step, batch_tokens=self.settings.batch_tokens,
                          seed=self.seed, epoch=epoch, micro_tokens=self.micro_tokens)

    def dealt(self, step: Sequence[Sequence[int]], number: int, size: int) -> Sequence[Sequence[int]]:
        """Its rows, cut anew: a process with half of them needs half as many micro-batches, not halves of all."""
        if size == 1:
            return step
        own = dealt([index for micro in step for index in micro], self._lengths, number, size)
        return micro_batches(own, self._lengths, self.micro_tokens)

    def batch(self, indices: Sequence[int], device: torch.device) -> Batch:
        """The examples of these indices as one padded batch."""
        batch = self.collate([self.examples[index] for index in indices])
        return batch if device.type == "cpu" else batch.to(device)

    def place(self, row: int) -> str:
        """What `place` was given for, else the row's number."""
        return self._place(row) if self._place is not None else f"row {row}"
