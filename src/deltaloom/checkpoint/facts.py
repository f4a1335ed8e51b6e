"""Facts of each site of an attached delta: parameters, rank, size of the change, singular values."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaloom.checkpoint.record import SiteFacts
from deltaloom.deltas.base import Delta, InputDelta, LowRankDelta, PrefixDelta
from deltaloom.errors import RefusedError
from deltaloom.sites import Site, affine_weight
from deltaloom.tuned import Tuned
from deltaloom.tuned.adapted import Adapted
from deltaloom.tuned.replaced import adds

MOST_SINGULAR = 64  # singular values that are kept of one site


def site_facts(tuned: Tuned, name: str | None = None) -> list[SiteFacts]:
    """One entry for each delta of a lane, in order. Norms are of the change that a delta alone makes to its frozen layer."""
    found = []
    for index, attached in enumerate(tuned.attached(name)):
        for site, delta in attached.attachment.deltas.items():
            parameters = sum(parameter.numel() for parameter in delta.parameters() if parameter.requires_grad)
            rank, norm, singular = _change(tuned, site, delta)
            found.append(SiteFacts(site=site.name, method=index, layer=site.layer, parameters=parameters, rank=rank, norm=norm,
                                   singular=singular))
    return found


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
    if isinstance(delta, PrefixDelta | InputDelta) or site.entry is not None:
        return None, None, None
    if adds(delta) and type(delta).fold is Delta.fold and not delta.override():
        added = [increment.detach().float().norm() for increment in delta.increments().values()]
        return None, float(torch.stack(added).norm()) if added else 0.0, None
    weight = _frozen_weight(tuned, site)
    if weight is None:
        return None, None, None
    override = delta.override().get("weight")
    if override is not None:
        own = override.detach().to(weight)
        return None, float((own - (weight if own.shape == weight.shape else weight.T)).norm()), None
    try:
        return None, float((delta.fold(weight, None)[0] - weight).norm()), None
    except RefusedError:
        return None, None, None


def _frozen_weight(tuned: Tuned, site: Site) -> Tensor | None:
    """The rows of a site's frozen weight as (d_out, d_in) in float32, or a norm's (d,); None where there is no dense one."""
    layer = tuned.model.get_submodule(site.path)
    base = layer.base if isinstance(layer, Adapted) else layer
    weight = dict(base.named_parameters(recurse=False)).get("weight")
    if weight is None or not weight.is_floating_point() or weight.ndim > 2:
        return None
    if site.kind == "norm":
        return weight.detach().float()
    whole = affine_weight(base).detach().float()
    return whole[slice(*site.part)] if site.part else whole
