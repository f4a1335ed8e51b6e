"""Deltas as plain low-rank ones, and several deltas as one: sums are exact by concatenating ranks, truncated only when asked to.

A sum of changes is a sum of matrices: sum w (B A) has the factors [w1 B1, w2 B2, ...] and [A1; A2; ...]. Summing A and B each
for themselves, as is common, is not it: the cross terms make relative errors of 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaloom.checkpoint.merges import Rule
from deltaloom.checkpoint.peft import load_any
from deltaloom.compact.face import affine_shape, own_tensors, stores_transposed
from deltaloom.deltas._ranked import exceptions
from deltaloom.deltas.base import Delta, LowRankDelta
from deltaloom.deltas.lora import LoRA
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.linalg.matrix import product_directions
from deltaloom.sites import Site
from deltaloom.tuned import Attached, SavedDelta, SavedMethod, Tuned, restore
from deltaloom.tuned.adapted import Adapted, wrappers
from deltaloom.tuned.merging import exact_tensors, refuse_unfoldable

NEGLIGIBLE = 1e-7  # singular values below this share of the largest one are rounding, for tensors kept in float32


@dataclass(frozen=True)
class Converted:
    """A low-rank delta, and the norm of what is missing in its changes over the norm of the changes."""

    saved: SavedDelta
    relative_error: float
    sites: Mapping[str, tuple[int, float]] = field(default_factory=dict)  # the same of each layer: (rank, relative error)


@dataclass(frozen=True)
class _Pair:
    """A change up @ down of the layer at a path."""

    down: Tensor
    up: Tensor


def to_lora(tuned: Tuned, name: str | None = None, rank: int | None = None, error: float | None = None) -> Converted:
    """A lane as one plain low-rank delta, with its heads as they are.

    Low-rank deltas keep their ranks and lose nothing; any other affine change of a weight gets the rank that it has, by its
    singular values. `rank` truncates every layer to it; `error` (0 to 1) leaves the fewest ranks in all with which the norm of
    what is missing is at most this share of the norm of the changes, and may leave a layer none.

    Raises:
        RefusedError: a delta is not an affine change, or changes more than weights of affine layers and embeddings.
        SettingsError: a rank and an error, or an error that is no share.
    """
    check_truncation(rank, error)
    if tuned.merged is not None:
        raise RefusedError("a delta is merged into the weights", got=tuned.merged, hint="Call `tuned.unmerge()` first.")
    heads = [attached for attached in tuned.attached(name) if _is_kept(attached)]
    return _truncated(_pairs(tuned, name or tuned.name, heads), rank, error, _head_parts(heads))


def check_truncation(rank: int | None, error: float | None) -> None:
    """Refuse an error that is no share, or beside a rank.

    Raises:
        SettingsError: what is wrong.
    """
    if error is not None and (rank is not None or not 0 < error < 1):
        raise SettingsError("an error to truncate to is a share, and takes the place of a rank",
                            got=f"error {error}" + (f" and rank {rank}" if rank is not None else ""), legal="between 0 and 1")


def combine(tuned: Tuned, weights: Mapping[str, float], rank: int | None = None, *, error: float | None = None,
            rule: Rule | None = None) -> Converted:
    """Several lanes as one low-rank delta: their weighted sum, or what a rule makes of the changes of each layer.

    A rule works on dense matrices, whose result gets the rank that it has, by its singular values; `rank` and `error` truncate as
    in `to_lora`. Heads are the weighted sum of their changes, whatever the rule.

    Raises:
        RefusedError: a delta is not an affine change, or the lanes have different heads. SettingsError: a weight is no number.
    """
    check_truncation(rank, error)
    if not weights:
        raise SettingsError("no delta is given to combine")
    bad = [f"{lane}: {weight}" for lane, weight in weights.items() if not abs(weight) < float("inf")]
    if bad:
        raise SettingsError("weights must be finite numbers", problems=bad)
    if tuned.merged is not None:
        raise RefusedError("a delta is merged into the weights", got=tuned.merged, hint="Call `tuned.unmerge()` first.")
    heads = {lane: [attached for attached in tuned.attached(lane) if _is_kept(attached)] for lane in weights}
    found: dict[str, list[tuple[float, _Pair]]] = {}
    for lane, weight in weights.items():
        for path, pair in _pairs(tuned, lane, heads[lane]).items():
            found.setdefault(path, []).append((weight, pair))
    pairs = {path: _joined(several) if rule is None else _ruled(rule, several) for path, several in found.items()}
    return _truncated(pairs, rank, error, _summed_heads(tuned, heads, weights))


def combine_folders(model: nn.Module, folders: Sequence[Path], weights: Sequence[float], rank: int | None = None, *,
                    error: float | None = None, rule: Rule | None = None) -> Converted:
    """`combine` for saved deltas (native or PEFT's) of one base; the model is given back as it was.

    Raises:
        CheckpointError: a folder is damaged or belongs to another base. RefusedError, SettingsError: as `combine`.
    """
    if len(folders) != len(weights) or not folders:
        raise SettingsError("each delta needs one weight", got=f"{len(folders)} deltas, {len(weights)} weights")
    tuned: Tuned | None = None
    try:
        for index, folder in enumerate(folders):
            target = model if tuned is None else tuned
            tuned = load_any(target, folder, f"d{index}")
        if tuned is None:
            raise SettingsError("no delta is given to combine")
        return combine(tuned, {f"d{index}": weight for index, weight in enumerate(weights)}, rank, error=error, rule=rule)
    finally:
        if tuned is not None:
            tuned.detach()


def put_back(model: nn.Module, converted: Converted, name: str = "default") -> Tuned:
    """The converted delta on its base, for instance to write it to PEFT's files."""
    return restore(model, converted.saved, name)


# ---- the changes of layers ----------------------------------------------------------------------------------------------


def _is_kept(attached: Attached) -> bool:
    """Whether a method replaces nothing but heads: those are kept, a head is no low-rank change."""
    deltas = attached.attachment.deltas
    return attached.is_head or all(site.role == "head" and delta.override() for site, delta in deltas.items())


@torch.no_grad()
def _pairs(tuned: Tuned, lane: str, heads: Sequence[Attached]) -> dict[str, _Pair]:
    """The change of each layer by the deltas of a lane that are no heads, as two factors."""
    kept = {id(delta) for attached in heads for delta in attached.attachment.deltas.values()}
    moving = [(site, delta) for site, delta in tuned.pairs(lane) if id(delta) not in kept]
    if not moving:
        raise RefusedError("nothing but heads has been changed", got=lane, hint="Keep the native format.")
    stacks = [site.name for site, _ in moving if site.kind == "stack"]
    if stacks:
        raise RefusedError("a low-rank delta changes matrices of affine layers, not kernels, experts or other stacks",
                           got=f"{len(stacks)} stacks", hint="Keep the native format, or merge.",
                           problems=[*stacks[:8], *([f"and {len(stacks) - 8} more"] if len(stacks) > 8 else [])])
    refuse_unfoldable(moving)
    pairs = {}
    for wrapper in wrappers(tuned.model):
        items = [(site, delta) for site, delta in wrapper.items(lane) if id(delta) not in kept]
        if items:
            whole = len(items) == len(wrapper.items(lane))
            pairs[wrapper.path] = _thin_pair(wrapper, items) or _dense_pair(wrapper, items, whole)
    return pairs


def _thin_pair(wrapper: Adapted, items: Sequence[tuple[Site, Delta]]) -> _Pair | None:
    """The factors of low-rank deltas, side by side; None if there are others."""
    downs, ups = [], []
    d_out = affine_shape(wrapper.base)[0] if all(isinstance(delta, LowRankDelta) for _, delta in items) else 0
    for site, delta in items:
        if not isinstance(delta, LowRankDelta):
            return None
        down, scale, up = (factor.detach().float() for factor in delta.factors())
        start, stop = site.part or (0, d_out)
        downs.append(down)
        ups.append(functional.pad(up * scale, (0, 0, start, d_out - stop)))
    return _Pair(torch.cat(downs), torch.cat(ups, 1))


def _dense_pair(wrapper: Adapted, items: Sequence[tuple[Site, Delta]], whole: bool) -> _Pair:
    """The change of a layer's weight by its singular values, all of them that are more than rounding."""
    path, own = wrapper.path, own_tensors(wrapper.base)
    exact = exact_tensors(wrapper, items)
    others = [key for key, tensor in exact.items() if key != "weight" and (key not in own or not torch.equal(
        tensor.double(), own[key].detach().double()))]
    if others or own["weight"].ndim != 2 or not whole:
        reason = f"the {', '.join(others)} of a layer" if others else "a norm" if whole else "a layer that is replaced as well"
        raise RefusedError(f"a low-rank delta cannot change {reason}", got=path, hint="Keep the native format, or merge.")
    change = exact.get("weight", own["weight"]).double() - own["weight"].detach().double()
    return _factored(change.T if stores_transposed(wrapper.base) else change)


def _factored(change: Tensor) -> _Pair:
    """A change (d_out, d_in) by its singular values, all of them that are more than rounding."""
    u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
    rank = max(1, int((s > NEGLIGIBLE * s[0]).sum()))
    root = s[:rank].sqrt()
    return _Pair((root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float())


def _joined(several: Sequence[tuple[float, _Pair]]) -> _Pair:
    """The weighted sum, exact."""
    return _Pair(torch.cat([pair.down for _, pair in several]), torch.cat([pair.up * weight for weight, pair in several], 1))


def _ruled(rule: Rule, several: Sequence[tuple[float, _Pair]]) -> _Pair:
    """What a rule makes of the changes of one layer; a lane that leaves the layer alone has no say in it."""
    return _factored(rule([pair.up @ pair.down for _, pair in several], [weight for weight, _ in several]))


@torch.no_grad()
def _truncated(pairs: Mapping[str, _Pair], rank: int | None, error: float | None,
               heads: Iterable[tuple[SavedMethod, dict[str, Tensor]]]) -> Converted:
    """One low-rank method with these factors (scale 1), cut to a rank or an error, and the heads behind it."""
    some = {path: pair for path, pair in pairs.items() if len(pair.down)}  # adaptive ranks leave some layers nothing
    pairs = some or {path: _Pair(pair.down.new_zeros(1, pair.down.shape[1]), pair.up.new_zeros(len(pair.up), 1))
                     for path, pair in pairs.items()}
    values = {path: product_directions(pair.up, pair.down)[1] for path, pair in pairs.items()}
    wanted = {path: len(pair.down) if rank is None else min(rank, len(pair.down)) for path, pair in pairs.items()}
    if error is not None:
        wanted = ranks_within(values, error)
    kept = {path: _cut(pair, wanted[path]) for path, pair in pairs.items() if wanted[path]}
    total = sum(float(each.square().sum()) for each in values.values())
    missing = sum(float(each[wanted[path]:].square().sum()) for path, each in values.items())
    ranks = {path: pair.down.shape[0] for path, pair in kept.items()}
    common, patterns = exceptions(ranks)
    method = LoRA(rank=int(common), alpha=common, rank_pattern=patterns, alpha_pattern=patterns, targets=tuple(kept))
    state = {f"0:{path}:{key}": tensor.contiguous() for path, pair in kept.items()
             for key, tensor in (("down", pair.down), ("up", pair.up))}
    methods = [SavedMethod(method, tuple(kept))]
    for part, tensors in heads:
        state |= {f"{len(methods)}:{key}": tensor for key, tensor in tensors.items()}
        methods.append(part)
    sites = {path: (wanted[path], _share(values[path][wanted[path]:], values[path])) for path in pairs}
    return Converted(SavedDelta(tuple(methods), state), (missing / total) ** 0.5 if total > 0 else 0.0, sites)


def _share(missing: Tensor, values: Tensor) -> float:
    whole = float(values.norm())
    return float(missing.norm()) / whole if whole > 0 else 0.0


def ranks_within(values: Mapping[str, Tensor], error: float) -> dict[str, int]:
    """The fewest ranks in all whose relative error is at most `error`, from each layer's singular values (descending).

    The smallest singular values of all layers go, as long as the root of the sum of their squares allows it.
    """
    places = [(float(value), path) for path, each in values.items() for value in each]
    left = error ** 2 * sum(value ** 2 for value, _ in places)
    ranks = {path: len(each) for path, each in values.items()}
    for value, path in sorted(places):
        left -= value ** 2
        if left < 0 or sum(ranks.values()) == 1:  # a delta of nothing at all is no delta
            break
        ranks[path] -= 1
    return ranks


def _cut(pair: _Pair, rank: int) -> _Pair:
    """The best approximation of that rank; the very factors where they have no more."""
    if len(pair.down) <= rank:
        return pair
    u, s, v = product_directions(pair.up, pair.down)
    root = s[:rank].sqrt()
    return _Pair((root[:, None] * v[:, :rank].T).float(), (u[:, :rank] * root).float())


# ---- heads --------------------------------------------------------------------------------------------------------------


def _head_parts(heads: Sequence[Attached]) -> list[tuple[SavedMethod, dict[str, Tensor]]]:
    return [(SavedMethod(attached.method, tuple(site.name for site in attached.attachment.deltas), attached.is_head),
             {f"{place}:{key}": tensor.detach() for place, module in attached.named_deltas()
              for key, tensor in module.state_dict().items()}) for attached in heads]


@torch.no_grad()
def _summed_heads(tuned: Tuned, heads: Mapping[str, list[Attached]],
                  weights: Mapping[str, float]) -> list[tuple[SavedMethod, dict[str, Tensor]]]:
    """base + sum of weight * (head - base), for heads that all lanes have alike."""
    parts = {lane: _head_parts(found) for lane, found in heads.items()}
    shapes = {lane: [(part.sites, {key: tensor.shape for key, tensor in tensors.items()}) for part, tensors in found]
              for lane, found in parts.items()}
    first = next(iter(parts.values()))
    other = [lane for lane, found in shapes.items() if found != next(iter(shapes.values()))]
    if other:
        raise RefusedError("the deltas have different heads, which have no sum", got=", ".join(other),
                           hint="Combine deltas of one task.")
    with tuned.bare() as model:
        base = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    summed = []
    for index, (part, tensors) in enumerate(first):
        total = {}
        for key in tensors:
            path, _, own = key.rpartition(":")
            start = base[f"{path}.{own}"]
            total[key] = start + sum(weight * (parts[lane][index][1][key].float() - start) for lane, weight in weights.items())
        summed.append((part, total))
    return summed
