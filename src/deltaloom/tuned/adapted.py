"""The wrapper around a layer that carries deltas: the frozen layer, the deltas in order, and a forward to read.

Which named deltas (lanes) act says a `Routing`. Where lanes are given row by row and the rows of each lie together, the frozen
layer runs once for all lanes that leave its input and its tensors as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from deltaloom.architectures import NOT_BY_ROW
from deltaloom.compact.face import own_tensors, own_types
from deltaloom.deltas.base import Delta, LowRankDelta
from deltaloom.errors import RefusedError
from deltaloom.kernels.dropout import of_lanes
from deltaloom.kernels.low_rank import Affine, low_rank_linear
from deltaloom.kernels.low_rank_lanes import Branch, low_rank_lanes
from deltaloom.sites import Site
from deltaloom.tuned.replaced import adds, call_replaced, with_increments
from deltaloom.tuned.routing import Routing, Stretch


class Tap:
    """Carries the input of a branch from the layer where it enters to the layer where it leaves."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        """The value, once."""
        value, self.value = self.value, None
        if value is None:
            raise RefusedError("a branch's output layer ran without its input layer",
                               hint="This model calls its layers in an order that the branch does not know; name other targets.")
        return value


class Adapted(nn.Module):
    """A frozen layer and, for each lane, the deltas that change it, applied in order."""

    def __init__(self, base: nn.Module, path: str, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.path = path
        self.lanes = nn.ModuleDict()
        self.sites: dict[str, list[Site]] = {}
        self.entries: list[Tap] = []          # branches that begin at this layer's input
        self.exits: dict[str, Tap] = {}       # branches that end at this layer's output, by site name
        self.routing = routing
        self.merged: str | None = None
        self.ran: set[str] = set()
        self._pairs: dict[str, list[tuple[Site, Delta]]] = {}  # what `items` gives, as long as no lane changes here

    def __getattr__(self, name: str) -> Any:
        """Attributes of the frozen layer (`weight`, `bias`, `in_features`, ...) for code that reads them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def extra_repr(self) -> str:
        """The lanes and their number of deltas."""
        return ", ".join(f"{lane.removeprefix('lane:')}: {len(sites)} deltas" for lane, sites in self.sites.items())

    def add(self, lane: str, site: Site, delta: Delta) -> None:
        """Append a delta to a lane."""
        key = f"lane:{lane}"
        self._pairs.pop(lane, None)
        if key not in self.lanes:
            self.lanes[key] = nn.ModuleList()
            self.sites[key] = []
        self._list(key).append(delta)
        self.sites[key].append(site)

    def remove(self, lane: str) -> None:
        """Forget a lane."""
        key = f"lane:{lane}"
        self._pairs.pop(lane, None)
        if key in self.lanes:
            del self.lanes[key]
            for site in self.sites.pop(key):
                self.exits.pop(f"{lane}/{site.name}", None)

    def discard(self, lane: str, gone: set[int]) -> None:
        """Forget the deltas of a lane with these ids."""
        kept = [(site, delta) for site, delta in self.items(lane) if id(delta) not in gone]
        taps = dict(self.exits)
        self.remove(lane)
        for site, delta in kept:
            self.add(lane, site, delta)
            if f"{lane}/{site.name}" in taps:
                self.exits[f"{lane}/{site.name}"] = taps[f"{lane}/{site.name}"]

    def items(self, lane: str | None) -> list[tuple[Site, Delta]]:
        """The (site, delta) pairs of a lane, in order."""
        if lane is None:
            return []
        found = self._pairs.get(lane)
        if found is None:
            key = f"lane:{lane}"
            pairs = zip(self.sites[key], self._list(key), strict=True) if key in self.lanes else ()
            found = self._pairs[lane] = [(site, delta) for site, delta in pairs if isinstance(delta, Delta)]
        return found

    def _list(self, key: str) -> nn.ModuleList:
        found = self.lanes[key]
        if not isinstance(found, nn.ModuleList):  # never: only `add` fills the dictionary
            raise TypeError(f"lane {key} holds a {type(found).__name__}")
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer with the deltas of the current lane; row by row where the routing says so."""
        x, args = (args[0], args[1:]) if args else (self._named_input(kwargs), ())
        for tap in self.entries:
            tap.value = x
        taken = {key: tap.take() for key, tap in self.exits.items() if tap.value is not None}
        if self.merged is not None:
            return self.base(x, *args, **kwargs)
        lanes = self.routing.lanes
        if not isinstance(lanes, tuple):
            return self._run(lanes, x, taken, None, args, kwargs)
        stretches = self.routing.stretches()
        if stretches is not None and x.shape[0] == len(lanes) and not self._shares_rows((*args, *kwargs.values())):
            return self._run_by_stretches(stretches, x, taken, args, kwargs)
        here = tuple(lane if f"lane:{lane}" in self.lanes else None for lane in lanes)  # rows without a delta go together
        if len(set(here)) == 1:
            return self._run(here[0], x, taken, None, args, kwargs)
        return self._run_by_rows(here, x, taken, args, kwargs)

    def _named_input(self, kwargs: dict[str, Any]) -> Any:
        """Take the input out of a call by keywords, as attention modules are called."""
        first = next(iter(inspect.signature(self.base.forward).parameters))
        if first not in kwargs:
            raise RefusedError("a layer with deltas was called without its first input", got=", ".join(kwargs), legal=first,
                               hint=f"Leave '{self.path}' out of the targets.")
        return kwargs.pop(first)

    def _run_by_rows(self, lanes: tuple[str | None, ...], x: Tensor, taken: dict[str, Tensor], args: tuple[Any, ...],
                     kwargs: dict[str, Any]) -> Tensor:
        if self._shares_rows((*args, *kwargs.values())):
            raise RefusedError("this layer does not work row by row, so that its rows cannot have different deltas",
                               got=self.path, hint="Give all rows the same delta, or leave this layer out of the targets.")
        if x.shape[0] == 1:  # positions that all rows share
            x = x.expand(len(lanes), *x.shape[1:])
        groups = [(lane, rows.to(x.device)) for lane, rows in Routing.rows(lanes, x.shape[0])]
        parts = []
        for lane, rows in groups:
            with self.routing.layout.narrowed(rows), of_lanes((lane,)):
                parts.append(self._run(lane, x[rows], taken, rows, args, kwargs))
        return torch.cat(parts)[torch.cat([rows for _, rows in groups]).argsort()]

    def _shares_rows(self, others: Sequence[Any]) -> bool:
        """Whether the layer's input, or what else it is called with, is not of single rows."""
        return self.path.endswith(NOT_BY_ROW) or any(isinstance(value, Tensor) for value in others)

    def _run_by_stretches(self, stretches: Sequence[Stretch], x: Tensor, taken: dict[str, Tensor], args: tuple[Any, ...],
                          kwargs: dict[str, Any]) -> Any:
        """The layer once for all lanes that leave its input and its tensors as they are, and for each other lane alone."""
        items = {stretch.lane: self.items(stretch.lane) for stretch in stretches}
        if not any(items.values()):
            return self.base(x, *args, **kwargs)
        apart = [stretch for stretch in stretches if any(_changes_layer(delta) for _, delta in items[stretch.lane])]
        if not apart:
            return self._run_together(stretches, x, taken, args, kwargs)
        parts: dict[int, Tensor] = {}
        for stretch in apart:
            with self._only(stretch):
                rows = stretch.rows.to(x.device)
                parts[stretch.start] = self._run(stretch.lane, x[stretch.start:stretch.stop], taken, rows, args, kwargs)
        rest = [stretch for stretch in stretches if stretch.start not in parts]
        if rest:
            with of_lanes([stretch.lane for stretch in rest]):
                y = self._run_together(rest, torch.cat([x[each.start:each.stop] for each in rest]), taken, args, kwargs)
            sizes = [each.stop - each.start for each in rest]
            parts |= dict(zip([each.start for each in rest], y.split(sizes), strict=True))
        return torch.cat([parts[stretch.start] for stretch in stretches])

    def _run_together(self, stretches: Sequence[Stretch], x: Tensor, taken: dict[str, Tensor], args: tuple[Any, ...],
                      kwargs: dict[str, Any]) -> Any:
        """The layer on rows x of these stretches in order, and what each lane's deltas make of its output."""
        face = affine_face(self.base) if not args and not kwargs and x.is_floating_point() else None
        items = [self.items(stretch.lane) for stretch in stretches]
        chosen = [_leading(own, [True] * len(own)) if face is not None else [] for own in items]
        stops = list(accumulate(stretch.stop - stretch.start for stretch in stretches))
        starts = [0, *stops[:-1]]
        branches = [] if face is None else [
            Branch(str(stretch.lane), start, stop, *_joined(own, face.d_out), _dropout(own[0][1]))
            for stretch, own, start, stop in zip(stretches, chosen, starts, stops, strict=True) if own]
        y = low_rank_lanes(face, x, branches) if face is not None and branches else self.base(x, *args, **kwargs)
        self.ran.update(str(stretch.lane) for stretch, own in zip(stretches, items, strict=True) if own)
        if all(len(own) == len(done) for own, done in zip(items, chosen, strict=True)):
            return y
        parts = []
        for stretch, own, done, start, stop in zip(stretches, items, chosen, starts, stops, strict=True):
            rows, part = stretch.rows.to(x.device), y[start:stop]
            with self._only(stretch):
                for site, delta in own[len(done):]:
                    key = f"{stretch.lane}/{site.name}"
                    seen = x[start:stop] if site.entry is None else self._branch_input(key, taken, rows)
                    part = _after(site, delta, seen, part)
            parts.append(part)
        return torch.cat(parts)

    @contextmanager
    def _only(self, stretch: Stretch) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self.routing.layout.narrowed(stretch.rows))
            stack.enter_context(of_lanes((stretch.lane,)))
            yield

    def _run(self, lane: str | None, x: Tensor, taken: dict[str, Tensor], rows: Tensor | None, args: tuple[Any, ...],
             kwargs: dict[str, Any]) -> Any:
        items = self.items(lane)
        if not items:
            return self.base(x, *args, **kwargs)
        self.ran.add(str(lane))
        inputs: list[Tensor] = []
        for site, delta in reversed(items):  # the last delta is the outermost: its `before` comes first
            inputs.append(x if site.entry is None else self._branch_input(f"{lane}/{site.name}", taken, rows))
            if site.entry is None:
                x = delta.before(x)
        inputs.reverse()
        fused = 0
        replaced = self._replaced(items)
        if replaced:
            y = call_replaced(self.base, replaced, (x, *args), kwargs)
        else:
            y, fused = self._base_with_low_rank(x, items, inputs, args, kwargs)
        for (site, delta), seen in zip(items[fused:], inputs[fused:], strict=True):
            y = _after(site, delta, seen, y)
        return y

    def _replaced(self, items: list[tuple[Site, Delta]]) -> dict[str, Tensor]:
        """What stands in for the layer's own tensors: overrides, with increments added, in the types of the layer's storage."""
        found = {name: tensor for _, delta in items for name, tensor in delta.override().items()}
        adding = any(adds(delta) for _, delta in items)
        if not found and not adding:
            return found
        if adding:
            found = with_increments(self.path, own_tensors(self.base), found, items)
        own = own_types(self.base)
        return {name: tensor.to(own[name]) if name in own else tensor for name, tensor in found.items()}

    def _branch_input(self, key: str, taken: dict[str, Tensor], rows: Tensor | None) -> Tensor:
        if key not in taken:
            return self.exits[key].take()  # raises: the branch's first layer did not run
        return taken[key] if rows is None else taken[key][rows]

    def _base_with_low_rank(self, x: Tensor, items: list[tuple[Site, Delta]], inputs: list[Tensor], args: tuple[Any, ...],
                            kwargs: dict[str, Any]) -> tuple[Any, int]:
        """The frozen layer's output, together with the leading low-rank deltas in one autograd function where that fits."""
        face = affine_face(self.base)
        fits = face is not None and not args and not kwargs and x.is_floating_point()
        chosen = _leading(items, [seen is x for seen in inputs]) if fits else []
        if not chosen or face is None:
            return self.base(x, *args, **kwargs), 0
        if len(chosen) == 1 and chosen[0][0].part is None:
            delta = chosen[0][1]
            return low_rank_linear(face, x, *delta.factors(), _dropout(delta), delta.rounded(x.dtype)), 1
        return low_rank_linear(face, x, *_joined(chosen, face.d_out), _dropout(chosen[0][1])), len(chosen)


def _leading(items: Sequence[tuple[Site, Delta]], sees_input: Sequence[bool]) -> list[tuple[Site, LowRankDelta]]:
    """The first deltas of a layer that one product can do together: low-rank ones of the layer's own input."""
    chosen: list[tuple[Site, LowRankDelta]] = []
    for (site, delta), sees in zip(items, sees_input, strict=True):
        fits = isinstance(delta, LowRankDelta) and type(delta).after is LowRankDelta.after and sees and site.entry is None
        if not fits or (chosen and _dropout(delta) != _dropout(chosen[0][1])):
            break
        chosen.append((site, delta))  # type: ignore[arg-type]
    return chosen


def _joined(chosen: Sequence[tuple[Site, LowRankDelta]], d_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of several deltas of a layer as those of one."""
    factors = [_whole_rows(site, *delta.factors(), d_out) for site, delta in chosen]
    if len(factors) == 1:
        return factors[0]
    return torch.cat([f[0] for f in factors]), torch.cat([f[1] for f in factors]), torch.cat([f[2] for f in factors], 1)


def _after(site: Site, delta: Delta, seen: Tensor, y: Tensor) -> Tensor:
    """The layer's output with one more delta; of a part of a fused layer in its rows."""
    if site.part is None:
        return delta.after(seen, y)
    start, stop = site.part
    return torch.cat((y[..., :start], delta.after(seen, y[..., start:stop]), y[..., stop:]), -1)


def _changes_layer(delta: Delta) -> bool:
    """Whether a delta's class changes the layer's input or its tensors: a look at the class, no computation."""
    kind = type(delta)
    return kind.before is not Delta.before or kind.override is not Delta.override or adds(delta)


def _dropout(delta: Delta) -> float:
    return delta.dropout if isinstance(delta, LowRankDelta) and delta.training else 0.0


def _whole_rows(site: Site, down: Tensor, scale: Tensor, up: Tensor, d_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of a fused layer's part as factors of the whole layer: zero rows around the part."""
    if site.part is not None:
        start, stop = site.part
        up = functional.pad(up, (0, 0, start, d_out - stop))
    return down, scale, up


class DenseAffine:
    """A frozen nn.Linear or Conv1D seen as an affine layer."""

    d_out: int

    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        self.layer = layer
        self.transposed = isinstance(layer, Conv1D)
        self.d_out = int(layer.weight.shape[1 if self.transposed else 0])

    def product(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out), bias included."""
        bias = None if self.layer.bias is None else self.layer.bias.to(x.dtype)
        if self.transposed:  # the operation of Conv1D itself, so that the bits are the same
            return torch.addmm(bias, x.reshape(-1, x.shape[-1]), self.layer.weight.to(x.dtype)).view(*x.shape[:-1], self.d_out)
        return functional.linear(x, self._weight(x.dtype), bias)

    def product_transposed(self, g: Tensor) -> Tensor:
        """g (..., d_out) -> (..., d_in)"""
        return g @ self._weight(g.dtype)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        weight = self.layer.weight.to(dtype)
        return weight.T if self.transposed else weight


def affine_face(layer: nn.Module) -> Affine | None:
    """The layer's affine face for the fused kernel, or None for a layer that is not affine."""
    if type(layer) is nn.Linear or type(layer) is Conv1D:
        return DenseAffine(layer)  # not isinstance: a subclass may compute something else
    return layer if isinstance(layer, Affine) else None


def wrappers(model: nn.Module) -> list[Adapted]:
    """All wrappers inside a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, Adapted)]


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path) if parent_path else model
    setattr(parent.base if isinstance(parent, Adapted) else parent, name, module)
