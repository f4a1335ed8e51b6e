"""From the scores of now and of the decision before to the components that stay.

Every rule maps `Scores` to (priority of each component, cost that may be kept); `keep_within` then keeps the components of the
highest priority that fit within that cost. Rules that divide the sum of two scores by one another are left out: they telescope,
so that the rank only follows the size of the gradients and dies with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SHARE = 0.1  # of the mean previous score that a component has to reach


@dataclass(frozen=True)
class Scores:
    """Components at one decision: scores now and before (n,), costs (n,), all float64; what the schedule allows, and its end."""

    now: Tensor
    before: Tensor
    costs: Tensor
    allowed: float
    target: float


Rule = Callable[[Scores], tuple[Tensor, float]]


def budget(scores: Scores) -> tuple[Tensor, float]:
    """The schedule alone (AdaLoRA): the best scores per cost."""
    return scores.now / scores.costs, scores.allowed


def share(scores: Scores) -> tuple[Tensor, float]:
    """Every component whose score reaches a tenth of the mean previous score; at the first decision, of the mean of now."""
    threshold = SHARE * _before(scores).mean()
    return scores.now, float(scores.costs[scores.now >= threshold].sum())


def effective(scores: Scores) -> tuple[Tensor, float]:
    """As many components as exp(entropy) of the mean of the current and the previous shares says (Roy & Vetterli 2007)."""
    shares = relative_scores(scores)
    positive = shares[shares > 0]
    count = torch.exp(-(positive * positive.log()).sum()) if len(positive) else shares.new_zeros(())
    number = min(len(shares), int(torch.ceil(count - 1e-9)))
    order = _order(shares / scores.costs)
    return shares / scores.costs, float(scores.costs[order[:number]].sum())


def capped(scores: Scores) -> tuple[Tensor, float]:
    """`effective` within the schedule's limits: never above what it allows now, never below its end."""
    priority, wanted = effective(scores)
    return priority, min(scores.allowed, max(scores.target, wanted))


RULES: dict[str, Rule] = {"budget": budget, "share": share, "effective": effective, "capped": capped}


def relative_scores(scores: Scores) -> Tensor:
    """The mean of the current and the previous shares of the total score; equal shares where all scores are zero."""
    return (_shares(scores.now) + _shares(_before(scores))) / 2


def keep_within(priority: Tensor, costs: Tensor, allowed: float) -> Tensor:
    """A mask (n,) of components whose costs together are at most `allowed`, and at least one.

    Taken by priority; one that does not fit is passed over for what comes after it: where components differ in size, stopping
    there would leave much of a small budget unused. With equal costs it is an exact top-k. Ties go to the lower index, so that
    every process decides alike.
    """
    order = _order(priority).tolist()
    chosen, left = order[:1], allowed * (1 + 1e-12)
    prices = costs.tolist()
    left -= prices[order[0]]
    for index in order[1:]:
        if prices[index] <= left:
            chosen.append(index)
            left -= prices[index]
    mask = torch.zeros(len(priority), dtype=torch.bool, device=priority.device)
    mask[chosen] = True
    return mask


def _order(priority: Tensor) -> Tensor:
    return torch.sort(priority, descending=True, stable=True).indices


def _before(scores: Scores) -> Tensor:
    return scores.before if bool((scores.before > 0).any()) else scores.now


def _shares(values: Tensor) -> Tensor:
    total = values.sum()
    return values / total if total > 0 else torch.full_like(values, 1 / len(values))
