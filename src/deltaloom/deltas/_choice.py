"""Deltas of several methods at one place, seen as components of which some stay: what a choice among methods works on.

A `Part` is one delta with a mask over its components, and knows nothing of its method but the table that this gave for it
(`Components`). Masked components do nothing because their share of one tensor is kept at zero; rows of a prefix or prompt have no
such tensor, since a key of zeros still takes attention: they are left out where the model asks for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from deltaloom.deltas._adaptive import Rows, silence_rows
from deltaloom.deltas.base import Components, Delta, InputDelta, KeepRows, PrefixDelta, shapes_at
from deltaloom.errors import RefusedError


class Part(nn.Module):
    """One delta of one candidate, and which of its components stay: (E,) `mask`."""

    mask: Tensor

    def __init__(self, delta: Delta, components: Components) -> None:
        super().__init__()
        loose = sorted({name for name, p in delta.named_parameters() if p.requires_grad} - set(components.axes))
        if loose:
            raise RefusedError(f"a {type(delta).__name__} has trained numbers that belong to no component", problems=loose)
        if type(delta).override is not Delta.override or type(delta).increments is not Delta.increments:
            raise RefusedError(f"a {type(delta).__name__} changes the layer's own tensors, which cannot be chosen from")
        self.delta = delta
        self.components = components
        sizes = {1 if axis is None else delta.get_parameter(name).shape[axis] for name, axis in components.axes.items()}
        (count,) = sizes
        self.register_buffer("mask", torch.ones(count, dtype=torch.bool))
        self.budget = 0  # of all parts together, in numbers; the method says it where it attaches them
        self._born = {name: delta.get_buffer(name)[:1].clone() for name in components.constants}
        self._left: tuple[tuple[object, ...], Tensor | None] | None = None

    def tensors(self) -> Iterator[tuple[str, nn.Parameter, int | None]]:
        """(name, parameter, axis of the components) of each trained tensor."""
        for name, axis in self.components.axes.items():
            yield name, self.delta.get_parameter(name), axis

    def left(self, rows: Tensor) -> Tensor:
        """Of rows that are components those that stay."""
        key = (self.mask._version, id(self.mask), self.mask.device)
        if self._left is None or self._left[0] != key:  # looking at a mask waits for an accelerator
            self._left = key, None if bool(self.mask.all()) else self.mask.nonzero().squeeze(1)
        chosen = self._left[1]
        return rows if chosen is None else rows[chosen]

    def state(self) -> dict[str, Tensor]:
        """The delta's own tensors, of the components that stay; detached."""
        stays = self.mask.nonzero().squeeze(1)
        found = {name: tensor.detach() for name, tensor in self.delta.state_dict().items()}
        for name, parameter, axis in self.tensors():
            found[name] = parameter.detach() if axis is None else parameter.detach().index_select(axis, stays)
        return found

    # ---- what a controller does -----------------------------------------------------------------------------------

    def parts(self) -> list[Rows]:
        """Every trained tensor; one that is a single component is its numbers, all of them that component's."""
        return [Rows(p, None, axis) if axis is not None else Rows(p, torch.zeros(len(p), dtype=torch.long, device=p.device))
                for _, p, axis in self.tensors()]

    def silence(self) -> None:
        """Zero for what is masked; rows in front are hidden instead."""
        for name, parameter, axis in self.tensors():
            if name == self.components.zero:
                silence_rows(parameter, self.mask, axis or 0)

    def alive(self) -> Tensor:
        """Those whose deciding tensor is not zero; of rows in front all that stay."""
        for name, parameter, axis in self.tensors():
            if name == self.components.zero:
                values = parameter.detach()[None] if axis is None else parameter.detach().movedim(axis, 0)
                return values.flatten(1).any(1)[:len(self.mask)]
        return self.mask.clone()

    def numbers(self) -> Tensor:
        """Trained numbers of each component, (E,), float64."""
        each = sum(p.numel() if axis is None else p.numel() // max(1, p.shape[axis]) for _, p, axis in self.tensors())
        return torch.full((len(self.mask),), float(each), dtype=torch.float64)

    def keep(self, components: Tensor, keep_rows: KeepRows) -> None:
        """Remove all components but these."""
        for name, parameter, axis in list(self.tensors()):
            if axis is None:
                everything = torch.arange(len(parameter), device=parameter.device)
                kept = keep_rows(parameter, everything if len(components) else everything[:0])
            else:
                kept = keep_rows(parameter, components, axis)
            setattr(self.delta, name, kept)
        self._resize_constants(len(components))
        self.mask = self.mask[components]

    def fit(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Have as many components as saved tensors of these shapes; of shapes that do not belong together nothing is taken."""
        mask = shapes.get("mask", ())
        own = shapes_at(shapes, "delta.")
        wanted: dict[str, tuple[int, ...]] = {}
        for name, parameter, axis in self.tensors():
            shape = list(own.get(name, ()))
            if len(mask) != 1 or len(shape) != parameter.ndim:
                return
            if axis is not None and (shape[axis] != mask[0] or shape[:axis] != list(parameter.shape[:axis])
                                     or shape[axis + 1:] != list(parameter.shape[axis + 1:])):
                return
            wanted[name] = tuple(shape)
        for name, parameter, _ in self.tensors():
            if tuple(parameter.shape) != wanted[name]:
                parameter.data = parameter.data.new_zeros(wanted[name])
        if len(self.mask) != mask[0]:
            self._resize_constants(mask[0])
            self.mask = torch.ones(mask[0], dtype=torch.bool, device=self.mask.device)

    def orthonormalise(self, strength: float) -> None:
        """Nothing: no vectors here are kept orthonormal."""

    def residual(self) -> float:
        """0, as `orthonormalise`."""
        return 0.0

    def _resize_constants(self, count: int) -> None:
        for name, first in self._born.items():
            setattr(self.delta, name, first.to(self.mask.device).expand(count, *first.shape[1:]).contiguous())


def live(parts: nn.ModuleDict) -> list[Delta]:
    """The deltas that have a component left, in order."""
    return [part.delta for part in parts.values() if isinstance(part, Part) and len(part.mask)]


class ChosenDelta(Delta):
    """Deltas of several candidates at one layer or branch, composed in order."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(dict(parts))

    def before(self, x: Tensor) -> Tensor:
        """Through all, the last one first."""
        for delta in reversed(live(self.parts)):
            x = delta.before(x)
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Through all, each with the input that it was given."""
        deltas, inputs = live(self.parts), []
        for delta in reversed(deltas):
            inputs.append(x)
            x = delta.before(x)
        for delta, own in zip(deltas, reversed(inputs), strict=True):
            y = delta.after(own, y)
        return y

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Each folded in order; refuses what one of them refuses."""
        for delta in live(self.parts):
            weight, bias = delta.fold(weight, bias)
        return weight, bias

    def penalty(self) -> Tensor | None:
        """The sum of theirs."""
        found = [term for delta in live(self.parts) if (term := delta.penalty()) is not None]
        return torch.stack(found).sum() if found else None


class ChosenPrefix(PrefixDelta):
    """The rows of a prefix that stay."""

    changes_at_birth = "every query sees new keys and values from the start"

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(dict(parts))
        self._only = (next(iter(parts.values())),)  # in a tuple: it is registered above
        self.spares_first = self._delta().spares_first

    def _delta(self) -> PrefixDelta:
        delta = self._only[0].delta
        if not isinstance(delta, PrefixDelta) or type(delta).gates or len(self.parts) > 1:
            raise RefusedError("one attention module takes the prefix of one candidate, without a gate", got=type(delta).__name__)
        return delta

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """Those of the rows that stay."""
        keys, values = self._delta().keys_values()
        return self._only[0].left(keys), self._only[0].left(values)


class ChosenRows(InputDelta):
    """The rows of a prompt that stay."""

    changes_at_birth = "the model reads new rows from the start"

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(dict(parts))
        self._only = (next(iter(parts.values())),)
        if len(parts) > 1:
            raise RefusedError("one delta can hold one prompt only", got=f"{len(parts)} candidates with prompts")

    def rows(self) -> Tensor:
        """Those that stay."""
        delta = self._only[0].delta
        if not isinstance(delta, InputDelta):
            raise RefusedError("not a prompt", got=type(delta).__name__)
        return self._only[0].left(delta.rows())


def chosen(parts: Mapping[str, Part]) -> ChosenDelta | ChosenPrefix | ChosenRows:
    """The delta of one place, of the candidates' deltas there.

    Raises:
        RefusedError: more than one of them puts rows in front.
    """
    kinds = [type(part.delta) for part in parts.values()]
    if any(issubclass(kind, PrefixDelta) for kind in kinds):
        return ChosenPrefix(parts)
    return ChosenRows(parts) if any(issubclass(kind, InputDelta) for kind in kinds) else ChosenDelta(parts)
