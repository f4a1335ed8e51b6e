"""Rank-one terms with a coefficient each: what the methods whose rank changes while training are made of.

Component e is core_e * up_e down_e^T; it may be masked, and in the end it is removed. Rows are components, so that dropping some
keeps the others' memory together. A component may have two rows, the real and the imaginary part of its vectors. Components
of one block (one matrix, one frequency) are meant to have orthonormal vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaloom.deltas._adaptive import Rows, silence_rows
from deltaloom.deltas._orthogonality import residual, step_towards
from deltaloom.deltas.base import KeepRows


@dataclass(frozen=True)
class _Blocks:
    """Rows of real blocks, or of the real and the imaginary parts of complex ones: (B, n) indices, 0 where not `valid`."""

    rows: Tensor
    imaginary: Tensor | None
    valid: Tensor | None  # None: no padding

    def read(self, matrix: Tensor) -> Tensor:
        """(B, n, d), zero for padding."""
        found = matrix[self.rows]
        if self.imaginary is not None:
            found = torch.complex(found, matrix[self.imaginary])
        return found if self.valid is None else found * self.valid[..., None]

    def write(self, matrix: Tensor, blocks: Tensor) -> None:
        """Put blocks back."""
        where = slice(None) if self.valid is None else self.valid
        if self.imaginary is None:
            matrix[self.rows[where]] = blocks[where]
        else:
            matrix[self.rows[where]] = blocks[where].real
            matrix[self.imaginary[where]] = blocks[where].imag


class Triplets(nn.Module):
    """up (C, d_out), core (E, 1), down (C, d_in): E components with C rows, C = E unless some have two."""

    mask: Tensor
    owner: Tensor
    block: Tensor

    def __init__(self, up: Tensor, down: Tensor, block: Tensor | None = None, owner: Tensor | None = None) -> None:
        super().__init__()
        count = len(up) if owner is None else int(owner.max()) + 1
        self.up = nn.Parameter(up)
        self.core = nn.Parameter(up.new_zeros(count, 1))
        self.down = nn.Parameter(down)
        self.register_buffer("mask", torch.ones(count, dtype=torch.bool))
        # saved only where they say something
        self.register_buffer("owner", torch.arange(count) if owner is None else owner, persistent=owner is not None)
        self.register_buffer("block", torch.zeros(count, dtype=torch.long) if block is None else block,
                             persistent=block is not None)
        self.changes = 0  # how often components were removed or fitted: versions of new tensors begin anew
        self._blocks: tuple[tuple[object, ...], list[_Blocks]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is remembered of this object's tensors: those of a copy count their versions anew."""
        return super().__getstate__() | {"_blocks": None}

    def core_now(self) -> Tensor:
        """The coefficients (E,): all of them in training, so that masked ones can come back; else only those that stay."""
        core = self.core.squeeze(1)
        return core if self.training else core * self.mask

    def paired(self) -> bool:
        """Whether some components have two rows."""
        return len(self.owner) != len(self.core)

    def rows_of(self) -> Tensor:
        """How many rows each component has, (E,)."""
        return torch.bincount(self.owner, minlength=len(self.core))

    def structure(self) -> tuple[object, ...]:
        """A key of which rows and components there are: what is derived from them holds as long as it is the same."""
        return self.changes, self.owner._version, self.block._version, self.owner.device

    # ---- what a controller does -----------------------------------------------------------------------------------

    def parts(self) -> list[Rows]:
        """The three parameters, with the component that each row belongs to."""
        owner = self.owner if self.paired() else None
        return [Rows(self.core), Rows(self.up, owner), Rows(self.down, owner)]

    def silence(self) -> None:
        """A component whose coefficient is zero does nothing."""
        silence_rows(self.core, self.mask)

    def alive(self) -> Tensor:
        """Those whose coefficient is not zero."""
        return self.core.detach().flatten(1).any(1)

    def numbers(self) -> Tensor:
        """Trained numbers of each component, (E,), float64."""
        return self.rows_of().double() * (self.up.shape[1] + self.down.shape[1]) + 1

    def keep(self, components: Tensor, keep_rows: KeepRows) -> None:
        """Remove all components but these (indices, ascending)."""
        chosen = torch.zeros(len(self.core), dtype=torch.bool, device=self.core.device)
        chosen[components] = True
        rows = chosen[self.owner].nonzero().squeeze(1)
        self.owner = (chosen.cumsum(0) - 1)[self.owner[rows]]
        self.up, self.down = keep_rows(self.up, rows), keep_rows(self.down, rows)
        self.core = keep_rows(self.core, components)
        self.mask, self.block = self.mask[components], self.block[components]
        self.changes += 1

    def fit(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Have as many rows and components as saved tensors of these shapes have; their values are still to be loaded.

        Of tensors that do not belong together nothing is taken: the misfit is an error later.
        """
        device = self.core.device
        rows, components = ({shapes[name][:1] for name in names if name in shapes}
                            for names in (("up", "down", "owner"), ("core", "mask", "block")))
        if len(rows) != 1 or len(components) != 1 or ("owner" not in shapes and rows != components):
            return
        for name, tensor in self.state_dict(keep_vars=True).items():
            shape = shapes.get(name, ())
            if len(shape) == tensor.ndim and shape[1:] == tuple(tensor.shape[1:]) and shape != tuple(tensor.shape):
                tensor.data = tensor.data.new_zeros(shape)
        kept = self.state_dict()
        if "owner" not in kept:
            self.owner = torch.arange(len(self.core), device=device)
        if "block" not in kept:
            self.block = torch.zeros(len(self.core), dtype=torch.long, device=device)
        self.changes += 1

    @torch.no_grad()
    def orthonormalise(self, strength: float) -> None:
        """A step of all blocks towards orthonormal vectors."""
        for blocks in self.blocks():
            for matrix in (self.up, self.down):
                blocks.write(matrix, step_towards(blocks.read(matrix), strength, blocks.valid))

    def residual(self) -> float:
        """The largest deviation of a block from orthonormal vectors, ||X X^H - I|| / sqrt(n)."""
        return max((residual(blocks.read(matrix.detach()), blocks.valid) for blocks in self.blocks()
                    for matrix in (self.up, self.down)), default=0.0)

    def penalty(self, measure: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum of a measure (B, n, d) -> (B,) over all blocks of up and down; a complex block stands for two."""
        total = self.core.new_zeros(())
        for blocks in self.blocks():
            times = 1 if blocks.imaginary is None else 2
            for matrix in (self.up, self.down):
                if blocks.valid is None:
                    total = total + times * measure(blocks.read(matrix)).sum()
                    continue
                for index, valid in enumerate(blocks.valid):  # of unequal sizes: each without its padding
                    total = total + times * measure(blocks.read(matrix)[index, valid][None]).sum()
        return total

    def blocks(self) -> list[_Blocks]:
        """The real and the complex blocks, padded to one size each."""
        key = self.structure()
        if self._blocks is None or self._blocks[0] != key:
            self._blocks = (key, self._make_blocks())
        return self._blocks[1]

    def _make_blocks(self) -> list[_Blocks]:
        if not len(self.core):
            return []
        counts = self.rows_of()
        first = counts.cumsum(0) - counts
        found = []
        for width in (1, 2):
            members = (counts == width).nonzero().squeeze(1)
            if not len(members):
                continue
            names, place = torch.unique(self.block[members], return_inverse=True)
            sizes = torch.bincount(place)
            slot = torch.arange(len(members), device=place.device) - (sizes.cumsum(0) - sizes)[place]
            rows = place.new_zeros(len(names), int(sizes.max()))
            valid = torch.zeros_like(rows, dtype=torch.bool)
            rows[place, slot], valid[place, slot] = first[members], True
            found.append(_Blocks(rows, rows + 1 if width == 2 else None, None if bool(valid.all()) else valid))
        return found


def orthonormal_rows(count: int, width: int, generator: torch.Generator, *, paired: bool = False) -> Tensor:
    """Random orthonormal rows (count, width), count at most width; paired: (2 count, width), each row's real and imaginary
    part one after the other."""
    if not paired:
        return torch.linalg.qr(torch.randn(width, count, generator=generator)).Q.T.contiguous()
    rows = torch.linalg.qr(torch.randn(width, count, generator=generator, dtype=torch.complex64)).Q.T
    return torch.stack((rows.real, rows.imag), 1).reshape(2 * count, width)
