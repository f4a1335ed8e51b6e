"""What the tensor methods share: bases of a group of matrices, kept once, and a small core for each matrix.

    change of a matrix = scale * U S V^T,     U (d_out, r) and V (d_in, r) of the group, S (r, r) of the matrix

A group may also stack equal blocks that larger matrices are cut into; each block then has its own S. A matrix cut along one
side keeps the rank r: blocks below one another are [U S1; U S2; ...] V^T, blocks side by side U [S1 V^T, S2 V^T, ...].

Not a method: files whose names begin with _ are no entries of the registry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from deltaloom.deltas.base import AttachContext, Attachment, Delta, LowRankDelta, Method
from deltaloom.errors import RefusedError
from deltaloom.sites import Site


@dataclass(frozen=True)
class Group:
    """Matrices that share bases: the shape of one block, and how many blocks each site has as (rows, columns), one of them 1."""

    name: str
    d_out: int
    d_in: int
    grids: dict[Site, tuple[int, int]]

    @property
    def slices(self) -> int:
        """Number of blocks of all sites."""
        return sum(rows * columns for rows, columns in self.grids.values())


class Bases(nn.Module):
    """The bases of a group: `down` is V^T (r, d_in), `up` is U (d_out, r)."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)


class CoreDelta(LowRankDelta):
    """One site's change with a core of its own, (blocks, r, r); the bases are the attachment's, which keeps them once."""

    scale: Tensor

    def __init__(self, bases: Bases, core: Tensor, rows: int, scale: float, dropout: float) -> None:
        super().__init__()
        self._bases = (bases,)  # in a tuple: no submodule, it has its place among the shared modules
        self.core = nn.Parameter(core)
        self.rows = rows
        self.register_buffer("scale", torch.full((core.shape[-1],), scale), persistent=False)
        self.dropout = dropout

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """V^T, the constant scale, U, with the core on the side that is cut."""
        down, up = with_cores(self._bases[0], self.core, self.rows)
        return down, self.scale, up


def with_cores(bases: Bases, cores: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """down (r, d_in) and up (d_out, r) of a matrix from its blocks' cores (blocks, r, r), below one another if `rows` > 1."""
    if rows > 1:
        return bases.down, (bases.up @ cores).flatten(0, 1)
    return (cores @ bases.down).transpose(0, 1).flatten(1), bases.up


def square_groups(sites: Sequence[Site]) -> list[Group]:
    """One group of edge x edge blocks, and a group for each shape that cannot be cut into them along one side.

    The edge is the side that most of the matrices have, the smaller one of equals: the width of the model, which every matrix
    of a block reads or writes.
    """
    sides = Counter(side for site in sites for side in {site.d_out, site.d_in})
    edge = min(sides, key=lambda side: (-sides[side], side))
    square: dict[Site, tuple[int, int]] = {}
    others: dict[tuple[int, int], dict[Site, tuple[int, int]]] = {}
    for site in sites:
        if edge in (site.d_out, site.d_in) and site.d_out % edge == 0 and site.d_in % edge == 0:
            square[site] = (site.d_out // edge, site.d_in // edge)
        else:
            others.setdefault((site.d_out, site.d_in), {})[site] = (1, 1)
    groups = [Group(f"square-{edge}", edge, edge, square)] if square else []
    return groups + [Group(f"{d_out}x{d_in}", d_out, d_in, grids) for (d_out, d_in), grids in others.items()]


def uniform(shape: tuple[int, ...], bound: float, context: AttachContext) -> Tensor:
    """Values between -bound and bound; zeros where saved ones come right after."""
    values = torch.zeros(shape)
    return values if context.loading else values.uniform_(-bound, bound, generator=context.generator)


class SharedBasesMethod(Method, ABC):
    """A method whose matrices share bases within groups."""

    rank: int = Field(8, ge=1)
    """Number of columns of the bases: the largest rank of a matrix's change."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the layer's inputs that the change does not see in training."""

    @abstractmethod
    def groups(self, sites: Sequence[Site]) -> list[Group]:
        """Which matrices share bases; every site is in one group."""

    @abstractmethod
    def bases(self, group: Group, context: AttachContext) -> Bases:
        """New bases of a group."""

    @abstractmethod
    def delta(self, bases: Bases, group: Group, site: Site, context: AttachContext) -> Delta:
        """The change of one site of a group."""

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """One delta for each site, and the bases of each group as a shared module.

        Raises:
            RefusedError: the rank is above the smaller side of a block, where further columns would add nothing.
        """
        groups = self.groups(sites)
        narrow = [f"{next(iter(group.grids)).name}: blocks of ({group.d_out}, {group.d_in})" for group in groups
                  if self.rank > min(group.d_out, group.d_in)]
        if narrow:
            raise RefusedError("the rank is above the smaller side of a matrix", got=f"rank {self.rank}", problems=narrow[:20],
                               hint="Lower the rank, or leave these layers out of the targets.")
        shared: dict[str, nn.Module] = {}
        deltas: dict[Site, Delta] = {}
        for group in groups:
            bases = self.bases(group, context)
            shared[group.name] = bases
            deltas.update({site: self.delta(bases, group, site, context) for site in group.grids})
        return Attachment({site: deltas[site] for site in sites}, shared)
