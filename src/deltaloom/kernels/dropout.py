"""Dropout whose mask is drawn from a seed: nothing waits for the backward pass, and on a CPU it is several times faster.

torch draws one number for each element from a serial generator; on a CPU this takes longer than a small layer's matrix product.
Here 64 random bits decide four elements: an element is dropped if its 16 bits fall below p. The seed comes from torch's own
generator, so a run is as reproducible as before, and recomputed layers see the same mask.

Where several runs share a batch (`by_streams`), each has a stream of its own: its rows are drawn from its own generator, in the
shape that they would have alone, without the padding that the others brought. So its masks are those of the run alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaloom.errors import RefusedError

LEVELS = 1 << 15  # steps in which the probability is given: 0.1 becomes 3277/32768, and the scale fits it exactly


@dataclass(frozen=True)
class Stream:
    """One run's draws in a batch that several share: the next `rows` of it are this run's.

    `lane` is where its deltas are. `widths`: of an axis as the padded batch has it, to what this run alone would have; an axis
    whose size is not among them is no time axis, or is padded for nobody.
    """

    lane: str
    generator: torch.Generator
    rows: int
    widths: Mapping[int, int] = field(default_factory=dict)


_STREAMS: ContextVar[tuple[Stream, ...]] = ContextVar("streams", default=())


@contextmanager
def by_streams(streams: Sequence[Stream]) -> Iterator[None]:
    """Within the block every dropout draws by these streams, which hold all rows of the batch in order."""
    before = _STREAMS.set(tuple(streams))
    try:
        yield
    finally:
        _STREAMS.reset(before)


@contextmanager
def of_lanes(lanes: Collection[str | None]) -> Iterator[None]:
    """Within the block what is dropped out belongs to these lanes alone; nothing changes where there are no streams."""
    own = _STREAMS.get()
    if not own:
        yield
        return
    with by_streams([stream for stream in own if stream.lane in lanes]):
        yield


def streams() -> tuple[Stream, ...]:
    """Those by which dropout draws now; empty where one run has the batch for itself."""
    return _STREAMS.get()


@dataclass(frozen=True)
class Front:
    """Keys of a prefix before the text's on the last axis: `width` of them, `seen` (batch, width) by each row; None: by all."""

    width: int
    seen: Tensor | None


@dataclass(frozen=True)
class Part:
    """The draw of some rows: `rows` None stands for all. `front` of the last axis's entries are (own, all) a prefix's."""

    p: float
    seed: int
    rows: int | None = None
    widths: Mapping[int, int] = field(default_factory=dict)
    front: tuple[int, int] = (0, 0)

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """What is drawn of these rows of a tensor of that shape: (rows, width), (rows, time, width), (rows, ..., time, keys)."""
        rows = shape[0] if self.rows is None else self.rows
        if len(shape) < 3:
            return (rows, *shape[1:])
        if len(shape) == 3:
            return rows, self._own(shape[1]), shape[2]
        own, whole = self.front
        return (rows, *shape[1:-2], self._own(shape[-2]), own + self._own(shape[-1] - whole))

    def put(self, mask: Tensor, drawn: Tensor) -> None:
        """Write what was drawn where it belongs in these rows' mask."""
        if mask.ndim < 3:
            mask.copy_(drawn)
        elif mask.ndim == 3:
            mask[:, :drawn.shape[1]] = drawn
        else:
            own, whole = self.front
            part, keys = mask[..., :drawn.shape[-2], :], drawn.shape[-1] - own
            part[..., :own] = drawn[..., :own]
            part[..., whole:whole + keys] = drawn[..., own:]

    def _own(self, size: int) -> int:
        return self.widths.get(size, size)


@dataclass(frozen=True)
class Draw:
    """A dropout mask, which can be made again whenever it is needed; its parts share one p."""

    parts: tuple[Part, ...]

    def multiplier(self, like: Tensor) -> Tensor:
        """0 or the scale for each entry of `like`, in its shape and dtype; the same every time."""
        first = self.parts[0]
        if first.rows is None:
            return multiplier(like, first.p, first.seed)
        shapes = [part.shape(like.shape) for part in self.parts]
        counts = [math.prod(shape) for shape in shapes]
        made = multipliers(like, first.p, [(part.seed, count) for part, count in zip(self.parts, counts, strict=True)])
        if all(shape[1:] == like.shape[1:] for shape in shapes):
            return made.view(like.shape)
        mask, start = like.new_zeros(like.shape), 0
        for part, shape, piece in zip(self.parts, shapes, made.split(counts), strict=True):
            part.put(mask[start:start + shape[0]], piece.view(shape))
            start += shape[0]
        return mask


def drawn(x: Tensor, p: float, front: Front | None = None) -> Draw:
    """The next mask for x, (rows, ...): from torch's global generator, or for each stream's rows from its own.

    Raises:
        RefusedError: streams share the batch and x does not have its rows.
    """
    own = _STREAMS.get()
    if not own:
        return Draw((Part(p, new_seed()),))
    counts = [x.shape[0]] if len(own) == 1 else [stream.rows for stream in own]  # one run's may be places instead of rows
    if x.shape[0] != sum(counts):
        raise RefusedError("what all rows of a batch share is dropped out, which cannot be done for each run on its own",
                           got=tuple(x.shape))
    parts, start = [], 0
    for stream, rows in zip(own, counts, strict=True):
        pair = (0, 0)
        if front is not None:
            pair = (front.width if front.seen is None else int(front.seen[start].sum()), front.width)
        parts.append(Part(p, new_seed(stream.generator), rows, stream.widths, pair))
        start += rows
    return Draw(tuple(parts))


def dropout(x: Tensor, p: float, training: bool = True, front: Front | None = None) -> Tensor:
    """x with a share p of its entries zeroed and the others scaled up so that the mean stays; x itself when not training.

    `front` says which keys are a prefix's where x are the weights of attention.
    """
    if not training or p <= 0:
        return x
    if p >= 1:
        return x * 0
    if x.device.type != "cpu" and not _STREAMS.get():  # accelerators draw in parallel
        return torch.nn.functional.dropout(x, p, True)
    return _SeededDropout.apply(x, drawn(x, p, front))


def new_seed(generator: torch.Generator | None = None) -> int:
    """A seed from torch's global generator, or another."""
    return int(torch.randint(2**62, (), generator=generator).item())


def multiplier(like: Tensor, p: float, seed: int) -> Tensor:
    """0 or the scale for each entry of `like`, in its shape and dtype; the same for the same seed."""
    return multipliers(like, p, [(seed, like.numel())]).view(like.shape)


def multipliers(like: Tensor, p: float, seeds: Sequence[tuple[int, int]]) -> Tensor:
    """The multipliers of several seeds, each with so many entries, one after another in one flat tensor like `like`."""
    if like.device.type != "cpu":
        keep = torch.cat([torch.rand(count, generator=torch.Generator(device=like.device).manual_seed(seed), device=like.device)
                          for seed, count in seeds]) >= p
        return keep.to(like.dtype) / (1.0 - p)
    drawn = [np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.int16)[:count] for seed, count in seeds]
    bits = drawn[0] if len(drawn) == 1 else np.concatenate(drawn)
    dropped = round(p * LEVELS)
    # 15 bits as a signed number r in [-16384, 16383]; (limit - 1 - r) >> 15 is -1 (all bits set) where r >= limit, else 0
    bits >>= 1
    np.subtract(np.int16(dropped - LEVELS // 2 - 1), bits, out=bits)
    bits >>= 15
    scale = torch.tensor(LEVELS / (LEVELS - dropped), dtype=torch.bfloat16)
    bits &= np.int16(scale.view(torch.int16).item())
    found = torch.from_numpy(bits).view(torch.bfloat16)
    if like.dtype == torch.bfloat16:
        return found
    exact = LEVELS / (LEVELS - dropped) / float(scale)  # a bf16 scale is off by up to 0.4%; wider types get the exact one
    return found.to(like.dtype) * exact


class _SeededDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, draw: Draw) -> Tensor:
        ctx.draw = draw
        return x * draw.multiplier(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.draw.multiplier(grads[0]), None


class SeededDropout(torch.nn.Module):
    """Takes the place of torch.nn.Dropout inside a frozen model while it is trained."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x with dropout, in training mode."""
        return dropout(x, self.p, self.training)
