"""Stacks: parameters that are no plain matrix, seen as several matrices of one size.

    kernels of convolutions   (out, in / groups, *k)  ->  1 x (out, in / groups * prod(k)), as if the input were unfolded
    weights of many experts   (experts, out, in)      ->  experts x (out, in)
    a user's own layer        as `register_site` says

Whoever changes a stack sees (slices, d_out, d_in) only; `as_matrices` and `as_stored` go between that and the layer's storage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from deltaloom.architectures import TRANSPOSED_STACKS
from deltaloom.errors import TargetError, did_you_mean

Matrices = Callable[[tuple[int, ...]], tuple[int, int, int]]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
HOLDERS = (nn.ParameterList, nn.ParameterDict, ParametrizationList)  # are never called with the layer's input


@dataclass(frozen=True)
class Stack:
    """How one parameter of a module is seen: `slices` matrices of (d_out, d_in)."""

    tensor: str               # the parameter's name in its module
    slices: int
    d_out: int
    d_in: int
    transposed: bool = False  # the storage has d_in before d_out
    role: str | None = None   # None: from its name, as for other layers


@dataclass(frozen=True)
class _Rule:
    matrices: Matrices | None
    role: str | None

    def means(self, other: _Rule) -> bool:
        """Whether both say the same; two functions do if they were made from the same lines and hold nothing of their own."""
        a, b = self.matrices, other.matrices
        if a is not b and isinstance(a, FunctionType) and isinstance(b, FunctionType):
            return self.role == other.role and a.__code__ == b.__code__ and (a.__closure__, b.__closure__) == (None, None) \
                and (a.__defaults__, a.__kwdefaults__) == (b.__defaults__, b.__kwdefaults__)
        return a == b and self.role == other.role


_RULES: dict[type[nn.Module], dict[str, _Rule]] = {}


def register_site(layer_type: type[nn.Module], tensor: str, *, matrices: Matrices | None = None, role: str | None = None) -> None:
    """Make a parameter of your own layer a site of kind "stack", in every module of that type or of a subclass of it.

    `matrices` maps the parameter's shape to (slices, d_out, d_in), of which it is a plain reshape. By default a shape (a, b) is
    one matrix, (s, a, b) is s matrices, and a longer one is one matrix of its first axis by all others. `role` is what targets
    may call it; by default the parameter's name, or the layer's for a parameter called `weight`. What is registered comes before
    what deltaloom knows of the same parameter, and a subclass before its bases. The layer's other sites stay.

    Raises:
        TargetError: no type of layer, or registered before with another meaning. Whether the parameter exists, is of floating
            point and fits `matrices` shows when a model's sites are looked for, and is a TargetError then.
    """
    if not isinstance(layer_type, type) or not issubclass(layer_type, nn.Module):
        raise TargetError("a site is registered for a type of layer", got=repr(layer_type), legal="a subclass of torch.nn.Module")
    if not tensor or "." in tensor:
        raise TargetError("a site is registered for one of the layer's own parameters", got=tensor,
                          hint="Name the parameter alone, and register the type of the layer that holds it.")
    rule = _Rule(matrices, role)
    known = _RULES.setdefault(layer_type, {}).setdefault(tensor, rule)
    if not known.means(rule):
        raise TargetError("this parameter is registered already, with another meaning", got=f"{layer_type.__name__}.{tensor}",
                          hint="Register it once; for another meaning make a subclass of the layer.")


def stacks_of(module: nn.Module, path: str, in_block: bool) -> list[Stack]:
    """The stacks among a module's own parameters, in their order; `in_block`: the module is part of a numbered block.

    Raises:
        TargetError: a registered parameter does not exist, is of integers, or does not have the shape that was registered.
    """
    own = dict(module.named_parameters(recurse=False))
    rules = {tensor: rule for layer_type in reversed(type(module).__mro__) for tensor, rule in _RULES.get(layer_type, {}).items()}
    for tensor in rules:
        if tensor not in own and not (tensor in module._parameters and module._parameters[tensor] is None):
            raise TargetError("a registered site's layer has no such parameter of its own", got=f"{path}.{tensor}",
                              legal=list(own) or "none", hint=did_you_mean(tensor, own))
    found = []
    for tensor, parameter in own.items():
        stack = _registered(f"{path}.{tensor}", tensor, parameter, rules[tensor]) if tensor in rules else \
            _generic(module, tensor, parameter, in_block)
        if stack is not None:
            found.append(stack)
    return found


def as_matrices(stack: Stack, parameter: Tensor) -> Tensor:
    """A parameter as (slices, d_out, d_in); a view where possible."""
    if stack.transposed:
        return parameter.reshape(stack.slices, stack.d_in, stack.d_out).transpose(1, 2)
    return parameter.reshape(stack.slices, stack.d_out, stack.d_in)


def as_stored(stack: Stack, matrices: Tensor, shape: Sequence[int]) -> Tensor:
    """(slices, d_out, d_in) in the shape of the parameter."""
    return (matrices.transpose(1, 2) if stack.transposed else matrices).reshape(tuple(shape))


def _registered(name: str, tensor: str, parameter: Tensor, rule: _Rule) -> Stack:
    if not parameter.is_floating_point():
        raise TargetError("a registered site's parameter has to be of floating point", got=f"{name} ({parameter.dtype})",
                          hint="Load the model unquantised, or register another parameter.")
    shape = tuple(parameter.shape)
    if rule.matrices is None and len(shape) < 2:
        raise TargetError("a registered site's parameter is no matrix", got=f"{name} {shape}", legal="two or more axes",
                          hint="Say with `matrices` how its shape is seen as (slices, d_out, d_in).")
    seen = _by_default(shape) if rule.matrices is None else tuple(rule.matrices(shape))
    if len(seen) != 3 or not all(isinstance(size, int) and size > 0 for size in seen) or math.prod(seen) != parameter.numel():
        raise TargetError("the registered `matrices` do not fit the parameter", got=f"{seen} for {name} {shape}",
                          legal=f"(slices, d_out, d_in), positive, with the product {parameter.numel()}")
    return Stack(tensor, *seen, role=rule.role)


def _by_default(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) == 3:
        return shape
    return 1, shape[0], math.prod(shape[1:])


def _generic(module: nn.Module, tensor: str, parameter: Tensor, in_block: bool) -> Stack | None:
    shape = parameter.shape
    if not parameter.is_floating_point() or not parameter.numel() or isinstance(module, HOLDERS):
        return None
    if isinstance(module, CONVOLUTIONS):
        return Stack(tensor, 1, shape[0], shape[1:].numel()) if tensor == "weight" else None
    if isinstance(module, TRANSPOSED_CONVOLUTIONS):
        return Stack(tensor, 1, shape[1:].numel(), shape[0], transposed=True) if tensor == "weight" else None
    if not in_block or len(shape) != 3 or sorted(shape)[1] == 1:  # (1, 1, d) is a vector
        return None
    if getattr(module, "is_transposed", False) is True or type(module).__name__ in TRANSPOSED_STACKS:
        return Stack(tensor, shape[0], shape[2], shape[1], transposed=True)
    return Stack(tensor, shape[0], shape[1], shape[2])
