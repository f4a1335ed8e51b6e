"""Nearest embedding: the row is taken for the input embedding that is nearest to it.

Exact where the cut lies at the embeddings, weak behind a few layers; the baseline of every other attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from deltaloom.private.attacks._nearest import Nearest
from deltaloom.private.attacks.base import Knowledge, TokenAttack
from deltaloom.private.guards.base import Chain


class NearestEmbedding(TokenAttack):
    """Search of the embedding table, as it looks through the guards."""

    name: ClassVar[str] = "nearest-embedding"

    guesses: int = 5
    """Guesses for each token."""

    def recover(self, known: Knowledge, chain: Chain, seen: Sequence[Tensor]) -> list[Tensor]:
        """The nearest embeddings of every row."""
        search = Nearest(chain.centre(known.table))
        return [search.top(row, self.guesses) for row in seen]
