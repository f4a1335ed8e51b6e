"""Matching token by token through the attacker's own front, as SipIt (arXiv 2510.15511) does; what such attacks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deltaloom.private.attacks.base import Knowledge
from deltaloom.private.guards.base import Chain

Cost = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(distances (rows, candidates), candidates, ids guessed so far) -> what to minimise, (rows, candidates)."""


def match(known: Knowledge, chain: Chain, seen: Sequence[Tensor], proposals: Callable[[Tensor, Tensor], Tensor], cost: Cost, *,
          sweeps: int, guesses: int) -> list[Tensor]:
    """Guesses (time, k) of rows of any lengths.

    At each position every candidate is put behind what was guessed so far, run, and compared with what was sent. Where rows
    depend on later tokens too, the rest is filled with first guesses and the whole is swept several times.
    `proposals`: (rows that were sent (rows, d), ids so far (rows, time)) -> candidates (rows, c).
    """
    found: dict[int, Tensor] = {}
    for length in sorted({len(row) for row in seen}):
        places = [place for place, row in enumerate(seen) if len(row) == length]
        rows = torch.stack([seen[place] for place in places])
        if known.causal:
            guessed = _forwards(known, chain, rows, proposals, cost, guesses)
        else:
            guessed = _swept(known, chain, rows, proposals, cost, sweeps, guesses)
        found |= dict(zip(places, guessed, strict=True))
    return [found[place] for place in range(len(seen))]


def _forwards(known: Knowledge, chain: Chain, rows: Tensor, proposals: Callable[[Tensor, Tensor], Tensor], cost: Cost,
              guesses: int) -> Tensor:
    ids = torch.tensor(known.before, dtype=torch.int64).expand(len(rows), -1)
    best = [ids[:, place, None].expand(-1, guesses) for place in range(ids.shape[1])]
    for place in range(ids.shape[1], rows.shape[1]):
        candidates = proposals(rows[:, place], ids)
        trials = torch.cat([ids[:, None].expand(-1, candidates.shape[1], -1), candidates[:, :, None]], dim=2)
        ranked = _ranked(known, chain, trials, place, rows[:, place], candidates, ids, cost)
        best.append(_filled(ranked, guesses))
        ids = torch.cat([ids, ranked[:, :1]], dim=1)
    return torch.stack(best, dim=1)


def _swept(known: Knowledge, chain: Chain, rows: Tensor, proposals: Callable[[Tensor, Tensor], Tensor], cost: Cost, sweeps: int,
           guesses: int) -> Tensor:
    nothing = torch.zeros(rows.shape[0] * rows.shape[1], 0, dtype=torch.int64)
    candidates = proposals(rows.flatten(0, 1), nothing).view(*rows.shape[:2], -1)
    ids = candidates[:, :, 0].clone()
    first, last = len(known.before), rows.shape[1] - len(known.after)
    ids[:, :first], ids[:, last:] = torch.tensor(known.before), torch.tensor(known.after)
    best = ids[:, :, None].repeat(1, 1, guesses)
    for _ in range(sweeps):
        for place in range(first, last):
            trials = ids[:, None].repeat(1, candidates.shape[2], 1)
            trials[:, :, place] = candidates[:, place]
            ranked = _ranked(known, chain, trials, place, rows[:, place], candidates[:, place], ids[:, :0], cost)
            best[:, place], ids[:, place] = _filled(ranked, guesses), ranked[:, 0]
    return best


def _filled(ranked: Tensor, guesses: int) -> Tensor:
    """The first guesses; the last one again if there are fewer."""
    return ranked[:, torch.arange(guesses).clamp(max=ranked.shape[1] - 1)]


def _ranked(known: Knowledge, chain: Chain, trials: Tensor, place: int, row: Tensor, candidates: Tensor, ids: Tensor,
            cost: Cost) -> Tensor:
    """The candidates, best first; trials (rows, candidates, time)."""
    hidden = known.run(trials.flatten(0, 1))[:, place].view(*candidates.shape, -1)
    distances = (chain.centre(hidden) - row[:, None]).float().norm(dim=2)
    order = cost(distances, candidates, ids).argsort(dim=1)
    return candidates.gather(1, order)
