"""Facts of each site of an attached delta: parameters, rank, size of the change, singular values; and of what sites share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaloom.checkpoint.record import SharedFacts, SiteFacts
from deltaloom.compact.face import affine_weight, own_types
from deltaloom.deltas.base import Delta, InputDelta, LowRankDelta, PrefixDelta
from deltaloom.errors import RefusedError
from deltaloom.sites import Site
from deltaloom.tuned import Tuned
from deltaloom.tuned.adapted import Adapted
from deltaloom.tuned.replaced import adds

MOST_SINGULAR = 64  # singular values that are kept of one site


def site_facts(tuned: Tuned, name: str | None = None) -> list[SiteFacts]:
    """One entry for each delta of a lane, in order. Norms are of the change that a delta alone makes to its frozen layer.

    Parameters of shared modules are left to `shared_facts`; what several sites share otherwise is counted at the first.
    """
    found = []
    seen = {id(parameter) for attached in tuned.attached(name) for module in attached.attachment.shared.values()
            for parameter in module.parameters()}
    for index, attached in enumerate(tuned.attached(name)):
        for site, delta in attached.attachment.deltas.items():
            rank, norm, singular = _change(tuned, site, delta)
            found.append(SiteFacts(site=site.name, method=index, layer=site.layer, parameters=_new_parameters(delta, seen),
                                   rank=rank, norm=norm, singular=singular))
    return found


def shared_facts(tuned: Tuned, name: str | None = None) -> list[SharedFacts]:
    """One entry for each module that several deltas of a method share; a parameter of several modules counts at the first."""
    seen: set[int] = set()
    return [SharedFacts(name=key, method=index, parameters=_new_parameters(module, seen))
            for index, attached in enumerate(tuned.attached(name)) for key, module in attached.attachment.shared.items()]


def _new_parameters(module: nn.Module, seen: set[int]) -> int:
    """Trainable elements whose parameters are not in `seen`, which takes them in."""
    fresh = [parameter for parameter in module.parameters() if parameter.requires_grad and id(parameter) not in seen]
    seen.update(id(parameter) for parameter in fresh)
    return sum(parameter.numel() for parameter in fresh)


def singular_values(down: Tensor, scale: Tensor, up: Tensor) -> Tensor:
    """Singular values (r,) of up diag(scale) down, largest first, from the two thin factors alone."""
    left = torch.linalg.qr((up * scale).double(), mode="r").R
    right = torch.linalg.qr(down.double().T, mode="r").R
    return torch.linalg.svdvals(left @ right.T)


@torch.no_grad()
def _change(tuned: Tuned, site: Site, delta: Delta) -> tuple[int | None, float | None, list[float] | None]:
    if isinstance(delta, LowRankDelta):
        down, scale, up = delta.factors()
        values = singular_values(down, scale, up)
        return down.shape[0], float(values.norm()), [float(value) for value in values[:MOST_SINGULAR]]
    if adds(delta) and type(delta).fold is Delta.fold and not delta.override():
        added = [increment.detach().float().norm() for increment in delta.increments().values()]
        return None, float(torch.stack(added).norm()) if added else 0.0, None
    change = dense_change(tuned, site, delta)
    return None, None if change is None else float(change.norm()), None


@torch.no_grad()
def dense_change(tuned: Tuned, site: Site, delta: Delta) -> Tensor | None:
    """What a delta alone adds to its site's frozen weight, as (d_out, d_in) in float32; None: it is no change of that weight."""
    if isinstance(delta, PrefixDelta | InputDelta) or site.entry is not None:
        return None
    weight = _frozen_weight(tuned, site)
    if weight is None:
        return None
    override = delta.override().get("weight")
    if override is not None:
        own = override.detach().to(weight)
        return (own if own.shape == weight.shape else own.T) - weight
    try:
        return delta.fold(weight, None)[0] - weight
    except RefusedError:
        return None


def _frozen_weight(tuned: Tuned, site: Site) -> Tensor | None:
    """The rows of a site's frozen weight as (d_out, d_in) in float32, or a norm's (d,); None where there is no dense one."""
    layer = tuned.model.get_submodule(site.path)
    base = layer.base if isinstance(layer, Adapted) else layer
    kind = own_types(base).get("weight")
    if kind is None or not kind.is_floating_point or base.weight.ndim > 2:  # type: ignore[operator]
        return None
    if site.kind == "norm":
        return base.get_parameter("weight").detach().float()
    whole = affine_weight(base, torch.float32).detach()
    return whole[slice(*site.part)] if site.part else whole
