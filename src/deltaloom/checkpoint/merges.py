"""Ways to make one change out of several changes of one layer, each a function of dense matrices and weights.

    linear   sum of w d                          exact for low-rank changes without forming any matrix; see `convert.combine`
    ties     mean of w d over those that agree   Yadav et al. 2023 (TIES-Merging, arXiv 2306.01708)
    dare     sum of w d', d' = d or 0            Yu et al. 2024 (DARE, arXiv 2311.03099)
    svd      the sum, truncated

A rule sees whole increments: a product of merged factors is no merge of products, and factors have signs of no meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaloom.errors import SettingsError, did_you_mean

Rule = Callable[[Sequence[Tensor], Sequence[float]], Tensor]

LINEAR = "linear"
DENSITY = 0.5  # of what stays, where nothing is said


@dataclass(frozen=True)
class Way:
    """One way to merge: how its rule is made from a density and a seed, and what it asks for."""

    make: Callable[[float, int], Rule | None]  # None: a sum, which needs no matrix
    thins: bool = False      # it has a density
    averages: bool = False   # its weights are those of a mean
    truncates: bool = False  # it needs a rank or an error


def rule_of(how: str, weights: Sequence[float], *, density: float | None = None, seed: int = 0, truncated: bool = False
            ) -> Rule | None:
    """The rule of a way of WAYS; None: a weighted sum.

    `density` is the share of the elements that stay, `seed` decides what is dropped at random.

    Raises:
        SettingsError: no such way, or settings that have no meaning for it.
    """
    if how not in WAYS:
        raise SettingsError("unknown way to combine deltas", got=how, legal=WAYS, hint=did_you_mean(how, WAYS))
    way = WAYS[how]
    if density is not None and (not way.thins or not 0 < density <= 1):
        raise SettingsError("the density is the share of the elements that stay", got=f"{density} with {how}",
                            legal=f"above 0, up to 1, with {' or '.join(name for name, each in WAYS.items() if each.thins)}")
    if way.averages and any(weight <= 0 for weight in weights):
        raise SettingsError(f"{how} takes a mean, whose weights have to be above 0", got=list(weights))
    if way.truncates and not truncated:
        raise SettingsError(f"{how} truncates the sum, and needs to know how far",
                            hint=f"Give --rank or --error; or use {LINEAR}.")
    return way.make(DENSITY if density is None else density, seed)


def ties(changes: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Trim, elect a sign, take the mean of those that have it; changes (d_out, d_in), weights above 0.

    Of each change the share `density` of its largest elements stays. An element's sign is that of the weighted sum, + for a sum
    of zero; its value is the weighted mean of the changes of that sign, zero where none has it.
    """
    trimmed = torch.stack([_largest(change, density) for change in changes])
    shares = torch.tensor(weights, dtype=trimmed.dtype)[:, None, None].expand_as(trimmed)
    sign = torch.where((shares * trimmed).sum(0) >= 0, 1.0, -1.0)
    agree = trimmed.sign() == sign
    total = torch.where(agree, shares, 0.0).sum(0)
    return torch.where(agree, shares * trimmed, 0.0).sum(0) / torch.where(total > 0, total, 1.0)


def dare(changes: Sequence[Tensor], weights: Sequence[float], density: float, generator: torch.Generator) -> Tensor:
    """The weighted sum of changes of which each element stays with probability `density`, and then is 1 / density as large."""
    kept = [change * (torch.rand(change.shape, generator=generator) < density) / density for change in changes]
    return torch.stack([weight * change for weight, change in zip(weights, kept, strict=True)]).sum(0)


def _largest(change: Tensor, density: float) -> Tensor:
    """The change with all but the share `density` of its largest elements zero; at least one stays."""
    count = max(1, int(density * change.numel()))
    kept = torch.zeros_like(change).view(-1)
    places = change.abs().flatten().topk(count).indices
    kept[places] = change.flatten()[places]
    return kept.view_as(change)


def _ties(density: float, seed: int) -> Rule:
    return lambda changes, weights: ties(changes, weights, density)


def _dare(density: float, seed: int) -> Rule:
    generator = torch.Generator().manual_seed(seed)
    return lambda changes, weights: dare(changes, weights, density, generator)


WAYS = {LINEAR: Way(lambda density, seed: None), "ties": Way(_ties, thins=True, averages=True),
        "dare": Way(_dare, thins=True), "svd": Way(lambda density, seed: None, truncates=True)}
