"""A group of layers of one role and shape whose increments are one tensor, kept in transformed, factored form.

Not a method: files whose names begin with _ are no entries of the registry. `grouped` says which matrices make a group,
`TensorGroup` holds its factors and gives each layer its own, `GradientGram` finds a transform before the first step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaloom.architectures import split_path
from deltaloom.deltas._triplets import Triplets, orthonormal_rows
from deltaloom.deltas.base import AttachContext, WarmUp
from deltaloom.linalg.transforms import LayerTransform, data, dct, dft, frame, haar, identity, rotation
from deltaloom.sites import Site

SKETCH = 64  # random directions in which gradients of layers are compared
STARTS = {"identity": identity, "dft": dft, "dct": dct, "haar": haar, "frame": frame,
          "data": identity,   # until the gradients of a few batches are known
          "learned": haar}


@dataclass(frozen=True)
class Member:
    """One frontal slice: a site, and which of its matrices (0 for an affine layer)."""

    site: Site
    slice: int

    @staticmethod
    def runs(members: Sequence[Member]) -> Iterator[tuple[int, tuple[Site, int]]]:
        """(place of the first slice, (site, number of slices)) of every site, in order."""
        for place, member in enumerate(members):
            if member.slice == 0:
                yield place, (member.site, member.site.slices)


@dataclass(frozen=True)
class _Reach:
    """What reaches one layer: rows of up and down (None: all), the component of each (None: in order), the layer's
    coefficients with the scale, and of paired rows the other row and how much of it enters."""

    rows: Tensor | None
    owner: Tensor | None
    weights: Tensor
    partner: Tensor | None
    turns: Tensor | None


def grouped(sites: Iterable[Site]) -> dict[str, list[Member]]:
    """Slices by group: the same shape, role, stack of blocks and place within the block, in order of depth."""
    found: dict[tuple[object, ...], list[Member]] = {}
    for site in sites:
        stack, _, rest = split_path(site.path)
        key = (stack, rest, site.role, site.tensor, site.d_out, site.d_in)
        found.setdefault(key, []).extend(Member(site, index) for index in range(site.slices))
    named: dict[str, list[Member]] = {}
    for members in found.values():
        first = members[0].site
        name = base = f"{first.role.replace('.', '-') or 'layer'}-{first.d_out}x{first.d_in}"
        number = 2
        while name in named:
            name, number = f"{base}-{number}", number + 1
        named[name] = members
    return named


class TensorGroup(nn.Module):
    """The factors of N increments (d_out, d_in): `rank` entries at each frequency of a transform over the N layers.

    An entry is a component of `triplets`; its block is its frequency. A pair of conjugate frequencies of the DFT is one frequency
    here, whose entries have two rows, real and imaginary part. `weights` and `turns` (F, N) are the transform's coefficients.
    """

    weights: Tensor
    turns: Tensor | None

    def __init__(self, transform: str, layers: int, rank: int, site: Site, scale: float, context: AttachContext) -> None:
        super().__init__()
        start = STARTS[transform](layers)
        self.layers, self.scale = layers, scale * site.d_out ** 0.5
        self.cost = site.d_out + site.d_in + 1
        self.triplets = _initial(start, rank, site, context)
        # saved where it was found from data; the others follow from the number of layers
        self.register_buffer("weights", start.weights.float(), persistent=transform == "data")
        self.register_buffer("turns", None if start.turns is None else start.turns.float(), persistent=False)
        self.skew = nn.Parameter(torch.zeros(layers * (layers - 1) // 2)) if transform == "learned" and layers > 1 else None
        self._rounded: tuple[tuple[object, ...], tuple[Tensor, Tensor]] | None = None
        self._known: dict[int, tuple[tuple[object, ...], _Reach]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what is remembered of this object's tensors: those of a copy count their versions anew."""
        return super().__getstate__() | {"_known": {}, "_rounded": None}

    def index(self) -> Tensor:
        """The index of each component within its frequency, (E,)."""
        block = self.triplets.block
        return torch.arange(len(block), device=block.device) - torch.searchsorted(block, block)

    def factors(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """down (R, d_in), coefficients (R,), up (d_out, R) of one layer, R the rows that reach it."""
        triplets, reach = self.triplets, self._reached(layer)
        core = triplets.core_now()
        core = core if reach.owner is None else core.index_select(0, reach.owner)
        down = triplets.down if reach.rows is None else triplets.down.index_select(0, reach.rows)
        up = triplets.up if reach.rows is None else triplets.up.index_select(0, reach.rows)
        weights = reach.weights
        if self.skew is not None:
            weights = self.scale * rotation(self.skew, self.weights)[:, layer].index_select(0, triplets.block)
        if reach.partner is None or reach.turns is None:
            return down, weights * core, up.T
        turned = triplets.down.index_select(0, reach.partner)
        return weights[:, None] * down + reach.turns[:, None] * turned, core, up.T

    @torch.no_grad()
    def rounded(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """down (R, d_in) and up (d_out, R) in a dtype, cast once in a step for all layers that all rows reach as they are."""
        reach, triplets = self._reached(layer), self.triplets
        if reach.rows is not None or reach.partner is not None:
            return None
        key = (dtype, triplets.down._version, triplets.up._version, *triplets.structure())
        # anew at the first layer of every pass: optimizers that write to `.data` leave versions as they are
        if layer == 0 or self._rounded is None or self._rounded[0] != key:
            self._rounded = (key, (triplets.down.to(dtype), triplets.up.to(dtype).T))
        return self._rounded[1]

    def slice(self, layer: int) -> Tensor:
        """The increment of one layer, (d_out, d_in)."""
        down, scale, up = self.factors(layer)
        return (up * scale) @ down

    def set_transform(self, transform: LayerTransform) -> None:
        """Another transform of as many real components."""
        self.weights.copy_(transform.weights)

    def _reached(self, layer: int) -> _Reach:
        """What reaches a layer; made anew when components were removed or loaded, or the transform was set."""
        key = (self.weights._version, self.triplets.core.dtype, *self.triplets.structure())
        known = self._known.get(layer)
        if known is None or known[0] != key:
            known = (key, self._reach(layer))
            self._known[layer] = known
        return known[1]

    def _reach(self, layer: int) -> _Reach:
        triplets = self.triplets
        frequency = triplets.block[triplets.owner]
        reached = self.weights[:, layer] != 0
        if self.turns is not None:
            reached |= self.turns[:, layer] != 0
        here = reached[frequency] if self.skew is None else torch.ones_like(frequency, dtype=torch.bool)
        rows = here.nonzero().squeeze(1)
        dtype = triplets.core.dtype
        weights = (self.scale * self.weights[:, layer].to(dtype))[frequency[rows]]
        whole = len(rows) == len(here)
        owner = None if whole and not triplets.paired() else triplets.owner[rows]
        if self.turns is None:
            return _Reach(None if whole else rows, owner, weights, None, None)
        partner, sign = self._partners()
        turns = (self.scale * self.turns[:, layer].to(dtype))[frequency[rows]] * sign[rows]
        return _Reach(None if whole else rows, owner, weights, partner[rows], turns)

    def _partners(self) -> tuple[Tensor, Tensor]:
        """For each row the other row of its component, and the sign with which it enters (0 where there is none)."""
        owner = self.triplets.owner
        order = torch.arange(len(owner), device=owner.device)
        again = torch.zeros_like(owner, dtype=torch.bool)
        again[1:] = owner[1:] == owner[:-1]          # the second row of a component
        first = torch.zeros_like(again)
        first[:-1] = again[1:]
        partner = order + first.long() - again.long()
        return partner, first.to(self.triplets.up.dtype) - again.to(self.triplets.up.dtype)


class GradientGram(WarmUp):
    """Sets `data` transforms: the eigenvectors of the layers' gradients' Gram matrix, from random sketches of them."""

    def __init__(self, places: Mapping[Site, tuple[TensorGroup, int]], batches: int) -> None:
        self.batches = batches
        self.places = dict(places)
        self.sketches: dict[Site, Tensor] = {}
        self.random = torch.Generator().manual_seed(0)
        self.directions: dict[int, Tensor] = {}

    def observe(self, site: Site, x: Tensor, gradient: Tensor) -> None:
        """Adds gradient^T x Omega, with one Omega (d_in, 64) for all layers; narrow layers are looked at as they are."""
        if site not in self.places:
            return
        width = x.shape[1]
        if width > SKETCH:
            if width not in self.directions:
                self.directions[width] = torch.randn(width, SKETCH, generator=self.random)
            x = x @ self.directions[width].to(x)
        sketch = gradient.T @ x
        self.sketches[site] = self.sketches[site] + sketch if site in self.sketches else sketch

    @torch.no_grad()
    def finish(self) -> None:
        """Set every group's transform; a layer that no batch has reached counts as having no gradient."""
        members: dict[int, tuple[TensorGroup, dict[int, Tensor]]] = {}
        for site, (group, layer) in self.places.items():
            if site in self.sketches:
                members.setdefault(id(group), (group, {}))[1][layer] = self.sketches[site].flatten().double().cpu()
        for group, sketches in members.values():
            nothing = torch.zeros_like(next(iter(sketches.values())))
            stack = torch.stack([sketches.get(layer, nothing) for layer in range(group.layers)])
            group.set_transform(data(stack @ stack.T))


def _initial(start: LayerTransform, rank: int, site: Site, context: AttachContext) -> Triplets:
    """Orthonormal vectors at every frequency; a pair of frequencies has complex ones, two rows each."""
    ups: list[Tensor] = []
    downs: list[Tensor] = []
    owner: list[int] = []
    block: list[int] = []
    for frequency, width in enumerate(start.width):
        for rows, size in ((ups, site.d_out), (downs, site.d_in)):
            rows.append(torch.zeros(rank * width, size) if context.loading else
                        orthonormal_rows(rank, size, context.generator, paired=width == 2))
        first = len(block)
        owner += [first + index // width for index in range(rank * width)]
        block += [frequency] * rank
    paired = len(owner) != len(block)
    return Triplets(torch.cat(ups), torch.cat(downs), torch.tensor(block), torch.tensor(owner) if paired else None)
