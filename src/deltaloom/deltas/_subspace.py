"""Parameters of deltas that are no parameters any more: they are computed from a few numbers, whenever these have changed.

`Subspace` takes the trainable tensors out of the modules that a method made and puts plain tensors in their places; the classes
below stand for the method's own deltas and see to it that those tensors are of now before each use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deltaloom.deltas.base import Attachment, Delta, InputDelta, LowRankDelta, PrefixDelta
from deltaloom.errors import RefusedError
from deltaloom.linalg.draws import Draws
from deltaloom.linalg.fastfood import Fastfood
from deltaloom.sites import Site

PRODUCTS = {"matmul", "mm", "bmm", "addmm", "linear", "einsum", "scaled_dot_product_attention", "conv1d", "conv2d", "conv3d"}
COMPUTED = "these initial values are computed, and not to the same bits on every machine, so that a seed cannot stand for them"


class Subspace(nn.Module):
    """theta_i = start_i + scale_i * (P z)_i: z (`coordinates`), the scales where they train, and all that follows from them.

    `modules` hold the tensors theta, which become plain attributes of theirs. The tensors of one module share a scale.
    """

    def __init__(self, modules: Sequence[nn.Module], dimension: int, scale: float | None, seed: int) -> None:
        super().__init__()
        learned = scale is None
        self.places, self.starts, owners = _taken_out(modules)
        self.sizes = [start.numel() for start in self.starts]
        count = dimension - len(modules) if learned else dimension
        self.coordinates = nn.Parameter(torch.zeros(count))
        factors = torch.full((len(modules),), 1.0 if scale is None else scale)
        if learned:
            self.scales = nn.Parameter(factors)
        else:
            self.register_buffer("scales", factors, persistent=False)
        self.owners = owners
        self.projection = Fastfood(sum(self.sizes), count, seed)
        self._stamp: tuple[object, ...] | None = None
        self._seen: tuple[Tensor, Tensor] = (self.coordinates.detach(), factors)

    def __getstate__(self) -> dict[str, Any]:
        """Without what was computed last, which belongs to a graph and cannot be copied."""
        self.forget()
        return super().__getstate__()

    def forget(self) -> None:
        """Let the modules hold no tensors of any graph."""
        self._stamp = None
        for places, start in zip(self.places, self.starts, strict=True):
            for module, name in places:
                setattr(module, name, start)

    def refresh(self) -> None:
        """Give the modules the tensors of now."""
        device, z, scales = self.coordinates.device, self.coordinates.detach(), self.scales.detach()
        stamp = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), device)
        # compared by value: fused optimizers change parameters without counting their versions up
        if stamp == self._stamp and torch.equal(z, self._seen[0]) and torch.equal(scales, self._seen[1]):
            return
        self.starts = [start.to(device) for start in self.starts]
        for places, tensor in zip(self.places, _Expand.apply(self.coordinates, self.scales, self), strict=True):
            for module, name in places:
                setattr(module, name, tensor)
        self._stamp, self._seen = stamp, (z.clone(), scales.clone())


class _Expand(torch.autograd.Function):
    """All tensors of a subspace at once.

    What backward needs is kept on the context, not with `save_for_backward`: one expansion serves several backward passes (of
    micro-batches), and it may happen within an activation checkpoint, which counts what its own block saves.
    """

    @staticmethod
    def forward(ctx: Any, coordinates: Tensor, scales: Tensor, subspace: Subspace) -> tuple[Tensor, ...]:
        change = subspace.projection(coordinates)
        ctx.subspace, ctx.learned = subspace, scales.requires_grad
        ctx.factors, ctx.change = scales.tolist(), change if scales.requires_grad else None
        parts = change.split(subspace.sizes)
        return tuple(start + (part * ctx.factors[owner]).view_as(start).to(start.dtype)
                     for start, part, owner in zip(subspace.starts, parts, subspace.owners, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, Tensor | None, None]:
        subspace: Subspace = ctx.subspace
        flat = [start.new_zeros(start.numel(), dtype=torch.float32) if grad is None else grad.reshape(-1).float()
                for grad, start in zip(grads, subspace.starts, strict=True)]
        back = subspace.projection.transposed(torch.cat([grad * ctx.factors[owner]
                                                         for grad, owner in zip(flat, subspace.owners, strict=True)]))
        if not ctx.learned:
            return back, None, None
        products = torch.stack([(grad * part).sum() for grad, part in zip(flat, ctx.change.split(subspace.sizes), strict=True)])
        owners = torch.tensor(subspace.owners, device=products.device)
        return back, products.new_zeros(len(ctx.factors)).index_add_(0, owners, products), None


def trainable(modules: Sequence[nn.Module]) -> Iterator[tuple[int, nn.Module, str, nn.Parameter]]:
    """(number of the module, submodule, name, parameter) of every trainable parameter; one that several share comes each time."""
    for number, module in enumerate(modules):
        for inner in module.modules():
            for name, parameter in inner.named_parameters(recurse=False):
                if parameter.requires_grad:
                    yield number, inner, name, parameter


def _taken_out(modules: Sequence[nn.Module]) -> tuple[list[list[tuple[nn.Module, str]]], list[Tensor], list[int]]:
    """For each parameter the places that hold it, its value, and the number of its first module; it leaves the modules."""
    found: dict[int, tuple[list[tuple[nn.Module, str]], Tensor, int]] = {}
    for number, module, name, parameter in list(trainable(modules)):
        places, _, _ = found.setdefault(id(parameter), ([], parameter.detach(), number))
        places.append((module, name))
    for places, start, _ in found.values():
        for module, name in places:
            delattr(module, name)
            setattr(module, name, start)
    return ([places for places, _, _ in found.values()], [start for _, start, _ in found.values()],
            [number for _, _, number in found.values()])


def within(attachment: Attachment, make: Callable[[Sequence[nn.Module]], Subspace]) -> Attachment:
    """The same deltas within a subspace; those without anything to train stay as they are."""
    moving = [module for module in (*attachment.deltas.values(), *attachment.shared.values()) if any(trainable([module]))]
    subspace = make(moving)
    bound = bool([module for module in attachment.shared.values() if module in moving])
    deltas = {site: _standing_for(delta, subspace) if bound or delta in moving else delta
              for site, delta in attachment.deltas.items()}
    return Attachment(deltas, {"subspace": subspace, **attachment.shared})


def without(attachment: Attachment) -> Attachment:
    """The method's own deltas, with the tensors that they have now."""
    deltas: dict[Site, Delta] = {}
    for site, delta in attachment.deltas.items():
        deltas[site] = delta
        if isinstance(delta, _Changing | _Adding | _LowRank | _Prefix | _Rows):
            delta.subspace[0].refresh()
            deltas[site] = delta.inner
    return Attachment(deltas, {name: module for name, module in attachment.shared.items() if not isinstance(module, Subspace)})


def _standing_for(delta: Delta, subspace: Subspace) -> Delta:
    cls = type(delta)
    if isinstance(delta, PrefixDelta):
        return _Prefix(delta, subspace)
    if isinstance(delta, InputDelta):
        return _Rows(delta, subspace)
    if isinstance(delta, LowRankDelta) and cls.after is LowRankDelta.after and cls.fold is LowRankDelta.fold:
        return _LowRank(delta, subspace)
    return _Adding(delta, subspace) if cls.increments is not Delta.increments else _Changing(delta, subspace)


def _penalty(inner: Delta, subspace: Subspace) -> Tensor | None:
    """The method's own, of the tensors of now; nothing is computed for one that has none."""
    if type(inner).penalty is Delta.penalty:
        return None
    subspace.refresh()
    return inner.penalty()


class _LowRank(LowRankDelta):
    """A low-rank delta within a subspace."""

    def __init__(self, inner: LowRankDelta, subspace: Subspace) -> None:
        super().__init__()
        self.inner = inner
        self.subspace = (subspace,)  # in a tuple: it has its place among the shared modules
        self.dropout = inner.dropout

    def __getstate__(self) -> dict[str, Any]:
        self.subspace[0].forget()
        return super().__getstate__()

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        self.subspace[0].refresh()
        return self.inner.factors()

    def penalty(self) -> Tensor | None:
        return _penalty(self.inner, self.subspace[0])


class _Changing(Delta):
    """A delta of any other kind that adds nothing to the layer's tensors."""

    def __init__(self, inner: Delta, subspace: Subspace) -> None:
        super().__init__()
        self.inner = inner
        self.subspace = (subspace,)

    def __getstate__(self) -> dict[str, Any]:
        self.subspace[0].forget()
        return super().__getstate__()

    def before(self, x: Tensor) -> Tensor:
        self.subspace[0].refresh()
        return self.inner.before(x)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        self.subspace[0].refresh()
        return self.inner.after(x, y)

    def override(self) -> dict[str, Tensor]:
        self.subspace[0].refresh()
        return self.inner.override()

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        self.subspace[0].refresh()
        return self.inner.fold(weight, bias)

    def penalty(self) -> Tensor | None:
        return _penalty(self.inner, self.subspace[0])


class _Adding(Delta):
    """A delta that adds to the layer's tensors, and does nothing else."""

    def __init__(self, inner: Delta, subspace: Subspace) -> None:
        super().__init__()
        self.inner = inner
        self.subspace = (subspace,)

    def __getstate__(self) -> dict[str, Any]:
        self.subspace[0].forget()
        return super().__getstate__()

    def increments(self) -> dict[str, Tensor]:
        self.subspace[0].refresh()
        return self.inner.increments()

    def penalty(self) -> Tensor | None:
        return _penalty(self.inner, self.subspace[0])


class _Prefix(PrefixDelta):
    """A prefix within a subspace."""

    changes_at_birth = "the model sees new keys and values from the start"

    def __init__(self, inner: PrefixDelta, subspace: Subspace) -> None:
        super().__init__()
        self.inner = inner
        self.subspace = (subspace,)
        self.spares_first, self.gates = inner.spares_first, inner.gates

    def __getstate__(self) -> dict[str, Any]:
        self.subspace[0].forget()
        return super().__getstate__()

    def keys_values(self) -> tuple[Tensor, Tensor]:
        self.subspace[0].refresh()
        return self.inner.keys_values()

    def log_gate(self, x: Tensor) -> Tensor | None:
        self.subspace[0].refresh()
        return self.inner.log_gate(x)

    def penalty(self) -> Tensor | None:
        return _penalty(self.inner, self.subspace[0])


class _Rows(InputDelta):
    """A prompt within a subspace."""

    changes_at_birth = "the model reads new rows from the start"

    def __init__(self, inner: InputDelta, subspace: Subspace) -> None:
        super().__init__()
        self.inner = inner
        self.subspace = (subspace,)

    def __getstate__(self) -> dict[str, Any]:
        self.subspace[0].forget()
        return super().__getstate__()

    def rows(self) -> Tensor:
        self.subspace[0].refresh()
        return self.inner.rows()


class RepeatableDraws(TorchFunctionMode):
    """Within a `with` block what torch would draw comes from `Draws`, and values that only one machine computes are refused."""

    def __init__(self, seed: int, stream: int) -> None:
        super().__init__()
        self.draws = Draws(seed, stream)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Take over what draws; leave everything else alone.

        Raises:
            RefusedError: a draw of another kind, a matrix decomposition or a matrix product.
        """
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name.startswith("linalg_") or name.strip("_") in PRODUCTS:
            raise RefusedError(COMPUTED, got=name.removeprefix("linalg_"), hint="Choose another `init` of the method in `over`.")
        if kwargs.get("generator") is None:
            return func(*args, **kwargs)
        del kwargs["generator"]
        if name in ("normal_", "uniform_"):
            return self._fill(name, *args, **kwargs)
        if name == "randint":
            return self._integers(*args, **kwargs)
        if name == "randn" and not kwargs.get("dtype", torch.float32).is_complex:
            shape = _shape(args)
            return self.draws.normals(shape.numel()).view(shape).to(kwargs.get("dtype", torch.float32))
        raise RefusedError(COMPUTED, got=name)

    def _fill(self, name: str, tensor: Tensor, first: float = 0.0, second: float = 1.0, **names: float) -> Tensor:
        first, second = names.get("mean", names.get("from", first)), names.get("std", names.get("to", second))
        drawn = self.draws.normals(tensor.numel()) if name == "normal_" else self.draws.uniforms(tensor.numel())
        width = second if name == "normal_" else second - first
        with torch.no_grad():
            return tensor.copy_((drawn * width + first).view(tensor.shape))

    def _integers(self, *args: Any, low: int = 0, high: int | None = None, size: Sequence[int] = ()) -> Tensor:
        numbers = [arg for arg in args if isinstance(arg, int)]
        shape = torch.Size(next((arg for arg in args if not isinstance(arg, int)), size))
        bounds = numbers if len(numbers) == 2 else [low, *(numbers or [int(high or 1)])]
        return self.draws.integers(shape.numel(), bounds[1] - bounds[0]).view(shape) + bounds[0]


def _shape(args: tuple[Any, ...]) -> torch.Size:
    return torch.Size(args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
