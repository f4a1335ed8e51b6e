"""Low-rank products of several lanes over one frozen layer: the layer runs once for all rows, the products in batches.

    y[rows of i] = x[rows of i] Wt + b + ((x[rows of i] down_iT) * scale_i) up_iT

Lanes whose rows are as many, one after another, are one batched product, their ranks filled up with zeros to the largest; no
row ever meets another lane's factors, so that a lane whose numbers are no longer finite harms none but itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaloom.kernels.dropout import Draw, drawn, of_lanes
from deltaloom.kernels.low_rank import Affine, scaled


@dataclass(frozen=True)
class Branch:
    """The low-rank product of one lane: of the rows start..stop of x, (d_in) -> (d_out), as in `low_rank_linear`."""

    lane: str
    start: int
    stop: int
    down: Tensor
    scale: Tensor
    up: Tensor
    dropout: float = 0.0


def low_rank_lanes(affine: Affine, x: Tensor, branches: Sequence[Branch]) -> Tensor:
    """The frozen layer plus each branch's low-rank product on its rows of x (rows, ..., d_in); branches are in order of rows."""
    draws = []
    for branch in branches:
        with of_lanes((branch.lane,)):
            draws.append(drawn(x[branch.start:branch.stop], branch.dropout) if branch.dropout > 0 else None)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        factors = [factor for branch in branches for factor in (branch.down, branch.scale, branch.up)]
        return _LowRankLanes.apply(x, affine, _blocks(branches, draws), *factors)


@dataclass(frozen=True)
class _Block:
    """Branches first..last of equally many rows each, which lie together."""

    first: int
    last: int
    start: int
    stop: int
    draws: tuple[Draw | None, ...]

    @property
    def count(self) -> int:
        return self.last - self.first

    def rows(self, x: Tensor) -> Tensor:
        """(lanes, rows of each, width), a view."""
        return x[self.start:self.stop].reshape(self.count, -1, x.shape[-1])

    def dropped(self, x: Tensor) -> Tensor:
        """The same with each lane's dropout."""
        if not any(self.draws):
            return self.rows(x)
        parts = zip(x[self.start:self.stop].chunk(self.count), self.draws, strict=True)
        found = [part if draw is None else part * draw.multiplier(part) for part, draw in parts]
        return torch.cat(found).reshape(self.count, -1, x.shape[-1])


def _blocks(branches: Sequence[Branch], draws: Sequence[Draw | None]) -> list[_Block]:
    found: list[_Block] = []
    for index, (branch, draw) in enumerate(zip(branches, draws, strict=True)):
        rows, last = branch.stop - branch.start, found[-1] if found else None
        if last is not None and last.stop == branch.start and last.stop - last.start == rows * last.count:
            found[-1] = _Block(last.first, index + 1, last.start, branch.stop, (*last.draws, draw))
        else:
            found.append(_Block(index, index + 1, branch.start, branch.stop, (draw,)))
    return found


class _LowRankLanes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, affine: Affine, blocks: list[_Block], *factors: Tensor) -> Tensor:
        y = affine.product(x)
        stacks = [_stacks(factors[3 * block.first:3 * block.last], x.dtype) for block in blocks]
        lows = [torch.bmm(block.dropped(x), stack[0].transpose(1, 2)) for block, stack in zip(blocks, stacks, strict=True)]
        for block, (_, scale, up), low in zip(blocks, stacks, lows, strict=True):
            y[block.start:block.stop].view(block.count, -1, y.shape[-1]).baddbmm_(scaled(low, scale), up)
        ctx.save_for_backward(x)
        ctx.affine, ctx.blocks, ctx.stacks, ctx.lows = affine, blocks, stacks, lows  # lows are small, so they are kept
        ctx.kinds = [(factor.dtype, factor.shape) for factor in factors]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        g, needs = grads[0].contiguous(), ctx.needs_input_grad
        found: list[Tensor | None] = [None] * len(ctx.kinds)
        grad_x = ctx.affine.product_transposed(g) if needs[0] else None
        for block, (down, scale, up), low in zip(ctx.blocks, ctx.stacks, ctx.lows, strict=True):
            rows, out = block.dropped(x), block.rows(g)
            back = torch.bmm(out, up.transpose(1, 2))                  # (lanes, rows, r)
            wanted = range(3 * block.first, 3 * block.last)
            if any(needs[3 + index] for index in wanted[1::3]):
                _give(found, ctx.kinds, wanted[1::3], (back * low).sum(1, dtype=scale.dtype))
            _give(found, ctx.kinds, wanted[2::3], torch.bmm(out.transpose(1, 2), scaled(low, scale)))
            back = scaled(back, scale)
            _give(found, ctx.kinds, wanted[0::3], torch.bmm(back.transpose(1, 2), rows))
            if grad_x is not None:
                _add_to_input(block, grad_x, back, down)
        return grad_x, None, None, *(grad if needs[3 + index] else None for index, grad in enumerate(found))


def _add_to_input(block: _Block, grad_x: Tensor, back: Tensor, down: Tensor) -> None:
    """The gradient with respect to the layer's input that comes through the low-rank products."""
    own = grad_x[block.start:block.stop]
    if not any(block.draws):
        own.view(block.count, -1, grad_x.shape[-1]).baddbmm_(back, down)
        return
    parts = zip(own.chunk(block.count), torch.bmm(back, down), block.draws, strict=True)
    for part, through, draw in parts:
        through = through.view_as(part)
        part += through if draw is None else through * draw.multiplier(through)


def _stacks(factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """down (lanes, r, d_in), scale (lanes, 1, r), up (lanes, r, d_out), filled up with zeros to the largest rank."""
    down, scale, up = factors[0::3], factors[1::3], [each.T for each in factors[2::3]]
    most = max(each.shape[0] for each in scale)
    return _stack(down, most).to(dtype), _stack(scale, most)[:, None], _stack(up, most).to(dtype)


def _stack(parts: Sequence[Tensor], most: int) -> Tensor:
    """Tensors (r, ...) as one (parts, most, ...), in one copy."""
    empty = parts[0].new_zeros(most, *parts[0].shape[1:])
    pieces = []
    for part in parts:
        pieces.append(part)
        if part.shape[0] < most:
            pieces.append(empty[part.shape[0]:])
    return torch.cat(pieces).view(len(parts), *empty.shape)


def _give(found: list[Tensor | None], kinds: Sequence[tuple[torch.dtype, torch.Size]], places: range, stacked: Tensor) -> None:
    """Each lane's own part of stacked gradients, without what was filled up."""
    if len({kinds[place][0] for place in places}) == 1:
        stacked = stacked.to(kinds[places[0]][0])  # in one copy
    for place, grad in zip(places, stacked.unbind(), strict=True):
        dtype, shape = kinds[place]
        own = grad if grad.shape == shape else grad[tuple(slice(size) for size in shape)]
        found[place] = own if own.dtype == dtype else own.to(dtype)
