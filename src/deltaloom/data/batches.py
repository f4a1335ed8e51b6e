"""Batches: which examples make an optimizer step, how a step is cut into micro-batches, and padded tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from deltaloom.attention import Segments
from deltaloom.data.encode import IGNORED, Example
from deltaloom.errors import SettingsError

GROUP = 50  # steps whose examples are sorted by length together, at most: little padding, and still a random mixture
GROUPS = 8  # groups an epoch has, at least: with fewer the same rows would meet in every epoch
WASTE = 0.2  # share of padding from which a micro-batch is cut in two
LEAST = 256  # real tokens a micro-batch should keep when it is cut: smaller products waste the processor
Kind = Literal["causal", "seq2seq", "class", "number", "tags"]


@dataclass(frozen=True)
class Batch:
    """A micro-batch, padded on the right.

    `inputs` are keyword arguments of the model (tensors, and the segments of packed rows), `labels` is (batch, time) or
    (batch,), None if a row has no target; `lengths` (batch,) are real tokens a row, `tokens` their sum, `padded_tokens` the
    size with padding. `places` (n,), for causal models: the flat positions whose next token is learned (known here, so that
    an accelerator need not wait to count them).
    """

    inputs: dict[str, Any]
    labels: Tensor | None
    examples: tuple[Example, ...]
    lengths: Tensor
    padded_tokens: int
    places: Tensor | None = None

    @property
    def rows(self) -> list[int]:
        """The rows' numbers, in the order of the batch."""
        return [example.row for example in self.examples]

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(example.length for example in self.examples)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        inputs = {name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                  for name, value in self.inputs.items()}
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        places = None if self.places is None else self.places.to(device, non_blocking=True)
        return replace(self, inputs=inputs, labels=labels, lengths=self.lengths.to(device, non_blocking=True), places=places)


@dataclass(frozen=True)
class Sizes:
    """What some rows of a padded batch would be as a batch of their own: their numbers, tokens, size with padding.

    `widths`: of a time axis, from the padded batch's width to theirs.
    """

    rows: list[int]
    tokens: int
    padded_tokens: int
    widths: dict[int, int]


def sizes_of(batch: Batch, start: int, stop: int) -> Sizes | None:
    """The sizes of the rows start..stop; None where two axes that are equally wide in the batch would not be so alone."""
    examples = batch.examples[start:stop]
    tokens = sum(example.length for example in examples)
    rows = [example.row for example in examples]
    ids, answers = batch.inputs.get("input_ids"), batch.inputs.get("decoder_input_ids")
    if ids is None:  # images: no padding
        return Sizes(rows, tokens, tokens, {})
    axes = [(ids.shape[1], max(len(example.input_ids) for example in examples))]
    if answers is not None:
        axes.append((answers.shape[1], max(len(example.answer_ids) for example in examples)))
    widths = dict(axes)
    if any(widths[whole] != own for whole, own in axes):
        return None
    return Sizes(rows, tokens, len(rows) * sum(own for _, own in axes), widths)


def plan_steps(lengths: Sequence[int], *, batch_size: int | None = None, batch_tokens: int | None = None, seed: int = 0,
               epoch: int = 0, micro_tokens: int = 2048) -> list[list[list[int]]]:
    """One epoch: for each optimizer step its micro-batches, as indices of examples; every example occurs once.

    A step holds `batch_size` examples, or as many as have at most `batch_tokens` real tokens (the last may be smaller).
    Examples are shuffled by seed and epoch alone, sorted by length within groups of up to 50 steps (at least 8 groups), cut
    into steps, and the steps are shuffled. A micro-batch has at most `micro_tokens` tokens with padding, unless one example is
    longer.
    """
    if (batch_size is None) == (batch_tokens is None):
        raise SettingsError("give one of batch_size and batch_tokens", got=f"{batch_size} and {batch_tokens}")
    size = batch_size if batch_size is not None else batch_tokens
    if size is None or size < 1 or micro_tokens < 1:
        raise SettingsError("batch_size, batch_tokens and micro_tokens must be at least 1", got=[size, micro_tokens])
    costs = [1] * len(lengths) if batch_size is not None else list(lengths)
    generator = random.Random(f"order {seed} {epoch}")  # a text: the same on every machine and in every process
    order = list(range(len(lengths)))
    generator.shuffle(order)
    together = max(1, min(GROUP, sum(costs) // (size * GROUPS)))
    steps = []
    for group in _filled(order, costs, size * together):
        group.sort(key=lambda index: lengths[index])  # stable: ties stay shuffled
        steps += _filled(group, costs, size)
    generator.shuffle(steps)
    return [micro_batches(step, lengths, micro_tokens) for step in steps]


def _filled(order: Sequence[int], costs: Sequence[int], most: int) -> list[list[int]]:
    """Consecutive parts whose costs sum to at most `most` (an example that alone costs more is a part of its own)."""
    parts: list[list[int]] = []
    room = 0
    for index in order:
        if not parts or costs[index] > room:
            parts.append([])
            room = most
        parts[-1].append(index)
        room -= costs[index]
    return parts


def micro_batches(indices: Sequence[int], lengths: Sequence[int], micro_tokens: int = 2048) -> list[list[int]]:
    """The examples in parts of similar length, longest first: within `micro_tokens`, and with little padding where that pays."""
    ordered = sorted(indices, key=lambda index: -lengths[index])
    parts = []
    while ordered:
        count = max(1, micro_tokens // max(1, lengths[ordered[0]]))
        parts += _cut(ordered[:count], lengths)
        ordered = ordered[count:]
    return parts


def dealt(indices: Sequence[int], lengths: Sequence[int], number: int, size: int) -> list[int]:
    """The examples that process `number` of `size` takes of an optimizer step: by length, there and back, so that all have alike.

    Process 0 has the longest one: it has examples if any process has.
    """
    ordered = sorted(indices, key=lambda index: -lengths[index])
    turns = range(0, len(ordered), size)
    places = (start + (number if turn % 2 == 0 else size - 1 - number) for turn, start in enumerate(turns))
    return [ordered[place] for place in places if place < len(ordered)]


def _cut(part: list[int], lengths: Sequence[int]) -> list[list[int]]:
    """The part, cut where the sum of padding becomes least, as long as it wastes much and the halves stay large enough."""
    real = sum(lengths[index] for index in part)
    padded = lengths[part[0]] * len(part)
    if padded - real <= WASTE * padded or real < 2 * LEAST:
        return [part]
    best, place, before = padded, 0, 0
    for count in range(1, len(part)):
        before += lengths[part[count - 1]]
        if before < LEAST or real - before < LEAST:
            continue
        size = lengths[part[0]] * count + lengths[part[count]] * (len(part) - count)
        if size < best:
            best, place = size, count
    return [*_cut(part[:place], lengths), *_cut(part[place:], lengths)] if place else [part]


def collate(examples: Sequence[Example], pad_id: int, kind: Kind, decoder_start: int | None = None) -> Batch:
    """Examples as tensors, padded on the right to the longest.

    Attention masks come from lengths, never from the pad id, which may be the id of EOS. Causal batches have none: no real
    token sees a pad behind it, and pads have no label. Labels of language models are unshifted with -100 where nothing is
    learned (the convention of transformers). Sequence to sequence: decoder inputs are labels moved by one behind `decoder_start`.
    """
    ids = _padded([example.input_ids for example in examples], pad_id)
    sizes = torch.tensor([len(example.input_ids) for example in examples])
    mask = (torch.arange(ids.shape[1])[None, :] < sizes[:, None]).long()
    inputs = {"input_ids": ids}
    padded = ids.numel()
    if kind != "causal":
        inputs["attention_mask"] = mask
        if all(example.token_type_ids is not None for example in examples):
            inputs["token_type_ids"] = _padded([example.token_type_ids or [] for example in examples], 0)
    labels = _labels(examples, kind)
    if kind == "seq2seq" and labels is not None:
        if decoder_start is None:
            raise SettingsError("the model's configuration names no decoder_start_token_id", hint="Is it an encoder-decoder?")
        shifted = torch.cat([labels.new_full((len(examples), 1), decoder_start), labels[:, :-1]], 1)
        inputs["decoder_input_ids"] = shifted.masked_fill(shifted == IGNORED, pad_id)
        padded += labels.numel()
    places = learned_places(labels) if kind == "causal" and labels is not None else None
    return Batch(inputs, labels, tuple(examples), torch.tensor([example.length for example in examples]), padded, places)


def pack(examples: Sequence[Example]) -> Batch:
    """Examples of a causal model one after another in a single row, without any padding; each sees itself only.

    Positions start anew at every example, and no example's first token is learned, so losses and gradients are those of
    separate rows. The model has to use our attention.
    """
    batch = collate(examples, 0, "causal")
    sizes = tuple(len(example.input_ids) for example in examples)
    segments = Segments(sizes)
    ids = torch.tensor([token for example in examples for token in example.input_ids])[None]
    labels = None
    if batch.labels is not None:
        rows = [row[:size].clone() for row, size in zip(batch.labels, sizes, strict=True)]
        for row in rows:
            row[:1] = IGNORED
        labels = torch.cat(rows)[None]
    inputs = {"input_ids": ids, "position_ids": segments.positions(), "segments": segments}
    places = learned_places(labels) if labels is not None else None
    return Batch(inputs, labels, batch.examples, batch.lengths, ids.numel(), places)


def learned_places(labels: Tensor) -> Tensor:
    """Flat positions (n,) of unshifted labels (batch, time) whose next token is learned."""
    following = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], 1)
    return (following.flatten() != IGNORED).nonzero().squeeze(1)


def _labels(examples: Sequence[Example], kind: Kind) -> Tensor | None:
    found = [example.labels for example in examples]
    if any(label is None for label in found):
        return None
    if kind in ("class", "number"):
        return torch.tensor(found, dtype=torch.long if kind == "class" else torch.float32)
    return _padded([label for label in found if isinstance(label, list)], IGNORED)


def _padded(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows), default=0)
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.long).view(len(rows), width)
