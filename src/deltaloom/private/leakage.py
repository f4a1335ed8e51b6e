"""Leakage: all attacks, for given guards and fronts, as a table; and the rule for the word "protective".

The share of tokens that an attack recovers counts positions whose first guess is right; tokens that stand around every text are
left out. A guess that knows nothing but frequencies stands beside it: the share of the commonest public token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltaloom.errors import DataError
from deltaloom.private.attacks.base import (
    Gradients,
    Knowledge,
    LabelAttack,
    MembershipAttack,
    TokenAttack,
    Updates,
    attacks_of,
    sent,
)
from deltaloom.private.guards._noise import new_key
from deltaloom.private.guards.base import Chain, Guard

MOST_RECOVERED = 0.10  # of tokens, by the best attack
MOST_LOST = 3.0        # points of accuracy
SMALLEST_SAMPLE = 200  # tokens below which nothing is called protective
Z = 1.96


@dataclass(frozen=True)
class Canary:
    """A secret that was planted: tokens start to stop of a row."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class Victim:
    """Texts whose rows the attacker sees: ids of each, hidden states (time, d) of the party's own front, planted canaries."""

    rows: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]
    canaries: tuple[Canary, ...] = ()


@dataclass(frozen=True)
class Case:
    """A chain of guards to measure; `accuracy` of the task under it in percent, if the caller has it."""

    name: str
    guards: tuple[Guard, ...] = ()
    accuracy: float | None = None


@dataclass(frozen=True)
class Recovered:
    """One line of the table: an attack, by an attacker with this knowledge, on these guards. Shares from 0 to 1."""

    case: str
    attack: str
    knows: str
    tokens: int
    top1: float
    top5: float
    texts: float
    """Texts that were recovered whole."""
    canaries: float | None
    """Planted secrets that were recovered whole; None if none were planted."""
    majority: float
    """What guessing the commonest public token gives."""

    @property
    def upper(self) -> float:
        """The upper end of the 95% interval of `top1` (Wilson 1927): few tokens prove little."""
        n, p = self.tokens, self.top1
        centre = p + Z * Z / (2 * n)
        return min(1.0, (centre + Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))) / (1 + Z * Z / n))


@dataclass(frozen=True)
class Verdict:
    """Whether a case may be called protective, and why (not)."""

    case: str
    protective: bool
    best: str
    recovered: float
    accuracy: float | None
    reason: str


@dataclass(frozen=True)
class Leakage:
    """The table, and a verdict for each case."""

    table: tuple[Recovered, ...]
    verdicts: tuple[Verdict, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def plant(rows: Sequence[Tensor], *, vocabulary: Sequence[int], length: int = 6, every: int = 4, seed: int = 0,
          edges: tuple[int, int] = (0, 0)) -> tuple[list[Tensor], list[Canary]]:
    """Rows with a random secret of `length` tokens in every `every`-th of them, not over the `edges` first and last tokens.

    Raises:
        DataError: no row is long enough.
    """
    generator = torch.Generator().manual_seed(seed)
    legal = torch.tensor(list(vocabulary), dtype=torch.int64)
    planted, canaries = [row.clone() for row in rows], []
    for place in range(0, len(rows), every):
        room = len(rows[place]) - sum(edges) - length
        if room < 0:
            continue
        start = edges[0] + int(torch.randint(room + 1, (1,), generator=generator))
        planted[place][start:start + length] = legal[torch.randint(len(legal), (length,), generator=generator)]
        canaries.append(Canary(place, start, start + length))
    if not canaries:
        raise DataError("no text is long enough for a planted secret", legal=f"at least {length + sum(edges)} tokens")
    return planted, canaries


def measure(cases: Sequence[Case], knowledge: Mapping[str, Knowledge], victim: Victim,
            attacks: Sequence[TokenAttack] | None = None, *, reference: float | None = None) -> Leakage:
    """Every attack by every attacker on every case.

    knowledge: attackers by name, e.g. with the party's prefix and without. attacks: None for all there are, with their
    defaults. reference: accuracy without guards, in percent, for the verdicts.

    Raises:
        DataError: there is no token to recover.
    """
    chosen = [cls() for cls in attacks_of(TokenAttack)] if attacks is None else list(attacks)
    tried = [attack for attack in chosen if isinstance(attack, TokenAttack)]
    table, verdicts = [], []
    for case in cases:
        guarded = sent(Chain(case.guards, new_key()), victim.hidden)
        lines = [_line(case.name, attack, knows, known, Chain(case.guards, new_key()), victim, guarded)
                 for knows, known in knowledge.items() for attack in tried]
        table += lines
        verdicts.append(verdict(case, lines, reference))
    return Leakage(tuple(table), tuple(verdicts))


def _line(case: str, attack: TokenAttack, knows: str, known: Knowledge, chain: Chain, victim: Victim,
          guarded: Sequence[Tensor]) -> Recovered:
    guesses = attack.recover(known, chain, guarded)
    inner = [slice(len(known.before), len(row) - len(known.after)) for row in victim.rows]
    tokens = torch.cat([row[part] for row, part in zip(victim.rows, inner, strict=True)])
    if not len(tokens):
        raise DataError("the victim's texts have no token to recover")
    right = [guess == row[:, None] for guess, row in zip(guesses, victim.rows, strict=True)]
    first = torch.cat([hit[part, 0] for hit, part in zip(right, inner, strict=True)])
    any_of_five = torch.cat([hit[part, :5].any(1) for hit, part in zip(right, inner, strict=True)])
    whole = [bool(hit[part, 0].all()) for hit, part in zip(right, inner, strict=True)]
    secrets = [bool(right[canary.row][canary.start:canary.stop, 0].all()) for canary in victim.canaries]
    return Recovered(case, attack.name, knows, len(tokens), _share(first), _share(any_of_five), sum(whole) / len(whole),
                     sum(secrets) / len(secrets) if secrets else None, _share(tokens == int(known.frequency.argmax())))


def verdict(case: Case, lines: Sequence[Recovered], reference: float | None) -> Verdict:
    """Protective: the best attack recovers under 10% of tokens (with 95% confidence) AND accuracy is within 3 points."""
    best = max(lines, key=lambda line: line.top1)
    named = f"{best.attack} ({best.knows})"
    lost = None if reference is None or case.accuracy is None else reference - case.accuracy
    if best.tokens < SMALLEST_SAMPLE:
        reason = f"only {best.tokens} tokens were measured, at least {SMALLEST_SAMPLE} are needed"
    elif best.upper >= MOST_RECOVERED:
        reason = f"{named} recovers {best.top1:.1%} of tokens (up to {best.upper:.1%}), not under {MOST_RECOVERED:.0%}"
    elif lost is None:
        reason = "the accuracy was not measured"
    elif lost > MOST_LOST:
        reason = f"accuracy falls by {lost:.1f} points, more than {MOST_LOST:.0f}"
    else:
        return Verdict(case.name, True, named, best.top1, case.accuracy,
                       f"{named} recovers {best.top1:.1%} of tokens, accuracy falls by {lost:.1f} points")
    return Verdict(case.name, False, named, best.top1, case.accuracy, reason)


def measure_labels(seen: Gradients, labels: Tensor) -> dict[str, dict[str, float]]:
    """For each label attack that can be tried: the share of `labels` (n,) recovered, and of the commonest label.

    Samples whose labels the attacker knew are left out; with two classes also the area under the ROC curve.
    """
    hidden = torch.ones(len(labels), dtype=torch.bool)
    hidden[list((seen.known or {}).values())] = False
    truth = labels[hidden]
    found = {}
    for attack in (cls() for cls in attacks_of(LabelAttack)):
        scores = attack.scores(seen) if isinstance(attack, LabelAttack) else None
        if scores is None:
            continue
        scores = scores[hidden]
        found[attack.name] = {"recovered": _share(scores.argmax(1) == truth), "majority": _share(truth == truth.mode().values)}
        if scores.shape[1] == 2:
            found[attack.name]["auc"] = auc(scores[:, 1] - scores[:, 0], truth == 1)
    return found


def measure_membership(seen: Mapping[str, Updates], samples: Sequence[object], trained: Tensor) -> dict[str, dict[str, float]]:
    """For each membership attack the area under the ROC curve on each of the updates (e.g. a single one, the common one).

    trained: (samples,) whether each was trained on; 0.5 is a coin.
    """
    attacks = [attack for attack in (cls() for cls in attacks_of(MembershipAttack)) if isinstance(attack, MembershipAttack)]
    return {attack.name: {name: auc(attack.scores(update, samples), trained) for name, update in seen.items()}
            for attack in attacks}


def auc(scores: Tensor, positive: Tensor) -> float:
    """The probability that a positive sample scores above a negative one; ties count half.

    Raises:
        DataError: all samples are of one kind.
    """
    ours, others = scores[positive].double(), scores[~positive].double()
    if not len(ours) or not len(others):
        raise DataError("an attack on membership or labels needs samples of both kinds", got=f"{len(ours)} and {len(others)}")
    others = others.sort().values
    below = torch.searchsorted(others, ours, side="left") + torch.searchsorted(others, ours, side="right")
    return float(below.double().mean() / 2 / len(others))


def _share(right: Tensor) -> float:
    return float(right.double().mean())
