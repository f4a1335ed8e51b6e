"""How much the layers' changes resemble one another: facts of each group of layers of one role and one shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaloom.checkpoint.facts import dense_change
from deltaloom.checkpoint.record import GroupFacts
from deltaloom.deltas.base import Delta, LowRankDelta
from deltaloom.linalg import depth_correlation, low_rank_gram
from deltaloom.sites import Site
from deltaloom.tuned import Tuned

MOST_DENSE = 2 ** 28       # elements of a group's dense changes, which are held together: 1 GiB in float32
CHUNK = 2 ** 16            # columns that are compared at a time in float64
Pair = tuple[Site, Delta]


def group_facts(tuned: Tuned, name: str | None = None) -> list[GroupFacts]:
    """One entry for each (role, d_out, d_in) of a method's linear sites in more than one layer, by first site.

    rho is the largest eigenvalue of the Gram matrix of the layers' changes over its trace. Low-rank changes are compared by their
    thin factors, others as dense matrices if the group has at most `MOST_DENSE` elements; rho is None for larger groups,
    for changes that are not affine, and where nothing has changed.
    """
    found = []
    for index, attached in enumerate(tuned.attached(name)):
        groups: dict[tuple[str, int, int], list[Pair]] = {}
        for site, delta in attached.attachment.deltas.items():
            if site.kind == "linear" and site.layer is not None:
                groups.setdefault((site.role, site.d_out, site.d_in), []).append((site, delta))
        for (role, d_out, d_in), pairs in groups.items():
            if len({(site.stack, site.layer) for site, _ in pairs}) > 1:
                found.append(_facts(tuned, pairs, role, (d_out, d_in), index))
    return found


@torch.no_grad()
def _facts(tuned: Tuned, pairs: Sequence[Pair], role: str, shape: tuple[int, int], method: int) -> GroupFacts:
    low_rank = [delta for _, delta in pairs if isinstance(delta, LowRankDelta)]
    ranks, gram = None, None
    if len(low_rank) == len(pairs):
        downs, scales, ups = zip(*(delta.factors() for delta in low_rank), strict=True)
        ranks = [down.shape[0] for down in downs]
        gram = low_rank_gram(downs, scales, ups)
    elif len(pairs) * shape[0] * shape[1] <= MOST_DENSE:
        gram = _dense_gram(tuned, pairs)
    residuals = [residual for _, delta in pairs if (residual := delta.orthogonality()) is not None]
    return GroupFacts(role=role, shape=shape, method=method, layers=len(pairs), rho=None if gram is None else _rho(gram),
                      ranks=ranks, residual=max(residuals, default=None))


def _rho(gram: Tensor) -> float | None:
    """The share of the largest eigenvalue; None of changes that are all zero."""
    return float(depth_correlation(gram)) if float(gram.trace()) > 0 else None


def _dense_gram(tuned: Tuned, pairs: Sequence[Pair]) -> Tensor | None:
    """<dW_l, dW_m> of dense changes, summed in float64; None if one of them is no change of its layer's weight."""
    changes = []
    for site, delta in pairs:
        change = dense_change(tuned, site, delta)
        if change is None:
            return None
        changes.append(change.flatten().cpu())
    whole = torch.stack(changes)
    gram = whole.new_zeros(len(pairs), len(pairs), dtype=torch.float64)
    for part in whole.split(CHUNK, dim=1):
        gram += part.double() @ part.double().T
    return gram
