"""Sequential matching: candidates of the probe table are tried in their context, the one that comes nearest is kept.

White box, as SipIt (arXiv 2510.15511): without noise, and with the true prefix, the right token matches exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from deltaloom.private.attacks._sequential import match
from deltaloom.private.attacks.base import Knowledge, TokenAttack
from deltaloom.private.guards.base import Chain


class SequentialMatching(TokenAttack):
    """Greedy, left to right; in models that look both ways the whole is swept."""

    name: ClassVar[str] = "sequential-matching"

    guesses: int = 5
    """Guesses for each token."""
    candidates: int = Field(default=64, ge=1)
    """Likeliest tokens of the probe table that are tried at each position."""
    sweeps: int = Field(default=2, ge=1)
    """Over the whole text, where rows depend on later tokens."""

    def recover(self, known: Knowledge, chain: Chain, seen: Sequence[Tensor]) -> list[Tensor]:
        """The candidates that come nearest."""
        search = known.likeliest(chain)
        return match(known, chain, seen, lambda rows, _: known.tokens[search.top(rows, self.candidates)],
                     lambda distances, *_: distances, sweeps=self.sweeps, guesses=self.guesses)
