"""Probe table: every token of the vocabulary goes through the front alone; a row is taken for the nearest of these.

Vocabulary matching as in "Hidden No More" (arXiv 2505.18332), without the context: needs no training text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from deltaloom.private.attacks.base import Knowledge, TokenAttack
from deltaloom.private.guards.base import Chain


class ProbeTable(TokenAttack):
    """Search of the table of single tokens, as it looks through the guards."""

    name: ClassVar[str] = "probe-table"

    guesses: int = 5
    """Guesses for each token."""

    def recover(self, known: Knowledge, chain: Chain, seen: Sequence[Tensor]) -> list[Tensor]:
        """The nearest probes of every row."""
        search = known.nearest(chain)
        return [known.tokens[search.top(row, self.guesses)] for row in seen]
