"""Merging: a lane's deltas folded into the model's own weights, with the rounding error measured; unmerging is bit-exact.

All of it is computed before anything is changed: overrides first, then increments, then `fold` in the order of the deltas, in
float64 (float32 for very large tensors), and then rounded once to the type that the base is stored in. A compact layer whose
weight changes is replaced by a dense one, or by one of its own form, whose error counts as rounding too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltaloom.compact import CompactLinear
from deltaloom.compact.face import affine_weight, dense_layer, is_affine, own_tensors, stores_transposed
from deltaloom.deltas.base import Delta, InputDelta, PrefixDelta
from deltaloom.errors import RefusedError
from deltaloom.sites import Site, input_layer, output_layer
from deltaloom.tuned.adapted import Adapted, replace_module, wrappers
from deltaloom.tuned.replaced import adds, with_increments

if TYPE_CHECKING:
    from deltaloom.tuned.model import Tuned

DOUBLE_UP_TO = 2 ** 26  # elements of a tensor that is folded in float64; above, two float64 copies would take a gigabyte


@dataclass(frozen=True)
class MergeFacts:
    """What merging did. Errors compare the weights as stored with the exactly folded ones."""

    name: str
    tensors: int            # changed tensors
    max_error: float        # largest absolute rounding error of an element
    relative_error: float   # norm of all rounding errors over the norm of all folded weights
    lost: float             # norm of all rounding errors over the norm of the whole change: what 16 bits swallow of it
    notes: tuple[str, ...] = ()


@dataclass
class Merged:
    """What `unmerge` needs: the parameters and layers that were replaced, and whether embeddings were tied."""

    kept: list[tuple[nn.Module, str, nn.Parameter | None]]
    layers: list[tuple[Adapted, nn.Module]]
    tied: bool | None
    requantised: bool


@dataclass
class _Change:
    wrapper: Adapted
    key: str
    old: nn.Parameter | None
    new: Tensor


@dataclass
class _Exchange:
    """A compact layer, and the layer with the deltas inside that takes its place."""

    wrapper: Adapted
    layer: nn.Module


@dataclass
class _Errors:
    largest: float = 0.0
    rounding: float = 0.0
    folded: float = 0.0
    changed: float = 0.0
    notes: list[str] = field(default_factory=list)


def merge(tuned: Tuned, name: str | None = None, *, requantise: bool = False) -> MergeFacts:
    """Fold all deltas of a lane (the one in use by default) into the weights. Until `unmerge`, no other lane can be used.

    The replaced tensors are kept, so this takes as much memory again as the changed layers have. Compact layers whose weights
    change become dense, or with `requantise` are stored in their own form again.

    Raises:
        RefusedError: a delta cannot be folded, with the reason; nothing has been changed.
    """
    lane = _lane(tuned, name)
    refuse_unfoldable(tuned.pairs(lane))
    errors = _Errors()
    found = [change for wrapper in wrappers(tuned.model) for change in _fold_layer(wrapper, lane, errors, requantise)]
    changes = [change for change in found if isinstance(change, _Change)]
    exchanges = [change for change in found if isinstance(change, _Exchange)]
    if not found:
        raise RefusedError("no layer has anything to merge", got=lane)
    kept = [(change.wrapper.base, change.key, change.old) for change in changes]
    layers = [(exchange.wrapper, exchange.wrapper.base) for exchange in exchanges]
    tied = _apply(tuned, lane, changes, errors.notes)
    for exchange in exchanges:
        exchange.wrapper.base = exchange.layer
        exchange.wrapper.merged = lane
    tuned.kept = Merged(kept, layers, tied, requantise)
    tuned.merged = lane
    tuned.routing.lanes = lane
    return MergeFacts(lane, len(found), errors.largest, _ratio(errors.rounding, errors.folded),
                      _ratio(errors.rounding, errors.changed), tuple(errors.notes))


def unmerge(tuned: Tuned) -> None:
    """Put the original tensors back, bit for bit.

    Raises:
        RefusedError: nothing is merged.
    """
    if tuned.kept is None:
        raise RefusedError("no delta is merged")
    for module, key, parameter in tuned.kept.kept:
        module.register_parameter(key, parameter)
    for wrapper, layer in tuned.kept.layers:
        wrapper.base = layer
    if tuned.kept.tied is not None:
        tuned.config.tie_word_embeddings = tuned.kept.tied
    for wrapper in wrappers(tuned.model):
        wrapper.merged = None
    tuned.merged = tuned.kept = None


def bake(tuned: Tuned) -> MergeFacts:
    """Fold the one delta into the weights for good and take the wrappers off: `tuned.model` is without deltas from now on.

    Compact layers stay in their own form. The tuned model is used up by this.

    Raises:
        RefusedError: a delta cannot be folded, or there are several; nothing has been changed.
    """
    if len(tuned.lanes) != 1:
        raise RefusedError("only a single delta can be folded in for good", got=", ".join(tuned.lanes))
    facts = merge(tuned, requantise=True)
    for wrapper in wrappers(tuned.model):
        replace_module(tuned.model, wrapper.path, wrapper.base)
    for name, parameter in tuned.model.named_parameters():
        parameter.requires_grad_(tuned.required_grad(name))
    tuned.lanes.clear()
    tuned.kept = tuned.merged = None
    return facts


@torch.no_grad()
def logits_error(tuned: Tuned, batch: Mapping[str, Any], name: str | None = None) -> float:
    """The largest absolute difference between the logits with a lane merged and unmerged; the state afterwards is as before.

    Models without logits compare their last hidden states. Sets the model to evaluation for the two passes.
    """
    merged = tuned.merged
    lane = merged or _lane(tuned, name)
    requantise = tuned.kept is not None and tuned.kept.requantised
    if merged is not None:
        unmerge(tuned)
    training, lanes = tuned.training, tuned.routing.lanes
    tuned.eval()
    with tuned.use(lane):
        apart = _output(tuned(**batch))
    merge(tuned, lane, requantise=requantise)
    together = _output(tuned(**batch))
    if merged is None:
        unmerge(tuned)
        tuned.routing.lanes = lanes
    tuned.train(training)
    return float((apart.double() - together.double()).abs().max()) if apart.numel() else 0.0


def _output(output: Any) -> Tensor:
    found = output.get("logits")
    return output.last_hidden_state if found is None else found


def _lane(tuned: Tuned, name: str | None) -> str:
    if tuned.merged is not None:
        raise RefusedError("a delta is merged into the weights already", got=tuned.merged,
                           hint="Call `tuned.unmerge()` first; to merge the sum of several deltas, combine them into one.")
    if name is None and len(tuned.in_use()) > 1:
        raise RefusedError("rows use different deltas, and only one can be merged", got=", ".join(tuned.in_use()),
                           hint="Name one, or combine them into one delta.")
    lane = name or tuned.name
    tuned.attached(lane)
    return lane


def refuse_unfoldable(pairs: Sequence[tuple[Site, Delta]]) -> None:
    """Check that every delta is one that can be folded; a single layer may still refuse when it folds.

    Raises:
        RefusedError: all those that cannot for what they are, with the reasons.
    """
    problems = []
    for site, delta in pairs:
        if isinstance(delta, PrefixDelta | InputDelta):
            problems.append(f"{site.name}: a {type(delta).__name__} adds rows, it changes no weight")
        elif site.entry is not None:
            problems.append(f"{site.name}: a {type(delta).__name__} runs beside the layer on another input")
        elif type(delta).fold is Delta.fold and not adds(delta) and not delta.override():
            problems.append(f"{site.name}: a {type(delta).__name__} is not an affine change")
    if problems:
        raise RefusedError("this delta cannot be merged into the weights", hint="Keep the delta next to the model.",
                           problems=[*problems[:8], *([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])])


@torch.no_grad()
def exact_tensors(wrapper: Adapted, items: Sequence[tuple[Site, Delta]]) -> dict[str, Tensor]:
    """The tensors that a layer has with these deltas, in high precision and in the layer's own orientation; only changed ones.

    Raises:
        RefusedError: a delta cannot be folded, with the reason.
    """
    own = own_tensors(wrapper.base)
    exact: dict[str, Tensor] = {key: tensor.detach() for _, delta in items for key, tensor in delta.override().items()}
    exact = with_increments(wrapper.path, own, exact, items, _high_precision)
    folding = [(site, delta) for site, delta in items
               if not delta.override() and not (adds(delta) and type(delta).fold is Delta.fold)]
    return exact | _folded(wrapper, own, exact, folding) if folding else exact


def _high_precision(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.numel() <= DOUBLE_UP_TO and tensor.device.type != "mps" else torch.float32


@torch.no_grad()
def _fold_layer(wrapper: Adapted, lane: str, errors: _Errors, requantise: bool) -> list[_Change | _Exchange]:
    exact = exact_tensors(wrapper, wrapper.items(lane))
    if isinstance(wrapper.base, CompactLinear) and "weight" in exact:
        return [_exchanged(wrapper, wrapper.base, exact, errors, requantise)]
    own = dict(wrapper.base.named_parameters(recurse=False))
    changes: list[_Change | _Exchange] = []
    for key, tensor in exact.items():
        old = own.get(key)
        stored = tensor.to(own["weight"].dtype if old is None and "weight" in own else tensor.dtype if old is None else old.dtype)
        if not bool(stored.isfinite().all()):
            raise RefusedError("the folded weights are not finite in the base's type",
                               got=f"{wrapper.path}.{key} ({stored.dtype})",
                               hint="Load the base in float32 or bfloat16.")
        if old is None:
            errors.notes.append(_new_tensor(wrapper.path, key))
        _add_errors(errors, tensor, stored, old)
        changes.append(_Change(wrapper, key, old, stored))
    return changes


def _exchanged(wrapper: Adapted, base: CompactLinear, exact: Mapping[str, Tensor], errors: _Errors,
               requantise: bool) -> _Exchange:
    """The layer that stands for a compact one with these tensors in its place."""
    weight = exact["weight"].T if base.transposed else exact["weight"]
    bias = exact.get("bias")
    stored = base.bias if bias is None else nn.Parameter(bias.to(base.dtype), requires_grad=False)
    layer = base.again(weight.float(), stored) if requantise else dense_layer(base, weight, stored)
    new = affine_weight(layer, torch.float32 if requantise else None)
    if not bool(new.isfinite().all()):
        raise RefusedError("the folded weights are not finite in the base's type", got=f"{wrapper.path}.weight ({base.dtype})",
                           hint="Load the base in float32 or bfloat16.")
    _add_errors(errors, weight, new, affine_weight(base, torch.float32))
    if bias is not None and stored is not None:
        _add_errors(errors, bias, stored, base.bias)
    if base.bias is None and stored is not None:
        errors.notes.append(_new_tensor(wrapper.path, "bias"))
    return _Exchange(wrapper, layer)


def _new_tensor(path: str, key: str) -> str:
    return (f"{path} has a new {key}: transformers' class has no place for it, so this merged model works in memory and cannot "
            "be saved as a plain one")


def _folded(wrapper: Adapted, own: Mapping[str, Tensor], overrides: Mapping[str, Tensor],
            items: Sequence[tuple[Site, Delta]]) -> dict[str, Tensor]:
    """The tensors that folding changes, in high precision and in the layer's own orientation."""
    base, path = wrapper.base, wrapper.path
    weight = overrides.get("weight", own.get("weight"))
    if weight is None or not weight.is_floating_point():
        raise RefusedError("the layer does not store a plain weight that a delta could be folded into",
                           got=f"{path} ({type(base).__name__})", hint="Merge into an unquantised base, or keep the delta apart.")
    dtype = _high_precision(weight)
    turned = stores_transposed(base)
    start = weight.detach().to(dtype)
    start = start.T if turned else start
    bias = overrides.get("bias", own.get("bias"))
    first_bias = None if bias is None else bias.detach().to(dtype)
    new, new_bias = start, first_bias
    for site, delta in items:
        new, new_bias = _fold_one(site, delta, new, new_bias)
    if not (is_affine(base) or isinstance(base, nn.Embedding)) and new is not start and not torch.equal(new, start):
        raise RefusedError("the weight of a layer that is not affine would change", got=f"{path} ({type(base).__name__})")
    if new_bias is not None and first_bias is None and (not is_affine(base) or turned):
        raise RefusedError("the layer has no bias and cannot take one", got=f"{path} ({type(base).__name__})",
                           hint="Keep the delta next to the model.")
    found = {}
    if new is not start:
        found["weight"] = (new.T if turned else new).contiguous()
    if new_bias is not None and new_bias is not first_bias:
        found["bias"] = new_bias
    return found


def _fold_one(site: Site, delta: Delta, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if site.part is None:
        return delta.fold(weight, bias)
    rows = slice(*site.part)
    new, new_bias = delta.fold(weight[rows], None if bias is None else bias[rows])
    weight = weight.clone()
    weight[rows] = new
    if new_bias is not None:
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.clone()
        bias[rows] = new_bias
    return weight, bias


def _add_errors(errors: _Errors, exact: Tensor, stored: Tensor, old: Tensor | None) -> None:
    exact = exact.double()
    rounding = stored.double() - exact
    if rounding.numel():
        errors.largest = max(errors.largest, float(rounding.abs().max()))
    errors.rounding += float(rounding.square().sum())
    errors.folded += float(exact.square().sum())
    errors.changed += float((exact if old is None else exact - old.detach().double()).square().sum())


def _ratio(part: float, whole: float) -> float:
    return (part / whole) ** 0.5 if whole > 0 else 0.0


def _apply(tuned: Tuned, lane: str, changes: list[_Change], notes: list[str]) -> bool | None:
    """Put the new tensors in place; gives back the configuration's tie flag if it had to be changed."""
    with tuned.bare() as model:
        holders: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for key, parameter in module.named_parameters(recurse=False):
                holders.setdefault(id(parameter), []).append((module, key))
        ends = (input_layer(model), output_layer(model))
    by_old: dict[int, list[_Change]] = {}
    for change in changes:
        by_old.setdefault(id(change.old) if change.old is not None else id(change), []).append(change)
    tied: bool | None = None
    for old, group in by_old.items():
        places = holders.get(old, [])
        together = len(group) == len(places) and all(torch.equal(change.new, group[0].new) for change in group[1:])
        shared = nn.Parameter(group[0].new, requires_grad=False)
        for change in group:
            new = shared if together else nn.Parameter(change.new, requires_grad=False)
            change.wrapper.base.register_parameter(change.key, new)
            change.wrapper.merged = lane
        if len(places) > 1 and not together:
            paths = ", ".join(change.wrapper.path for change in group)
            notes.append(f"{paths}: untied from the other layers that share the weight")
            if tied is None and any(module is end for module, _ in places for end in ends):
                tied = bool(tuned.config.tie_word_embeddings)
                tuned.config.tie_word_embeddings = False
    return tied
