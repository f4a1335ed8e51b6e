"""Sequential matching with a prior: the likelihood of the noise times what a language model expects next.

    argmin over v of  -log density(z - centre(front(guessed, v))) - log p(v | guessed)

What BeamClean (arXiv 2505.13758) does for embeddings, greedily and through the whole front; the owner of a language model has
the prior. Without one, the frequencies of the public text are it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deltaloom.private.attacks._sequential import match
from deltaloom.private.attacks.base import Knowledge, TokenAttack
from deltaloom.private.guards.base import Chain


class SequentialPrior(TokenAttack):
    """Greedy; candidates are the best of probe table and prior together, each half from one of them alone."""

    name: ClassVar[str] = "sequential-prior"

    guesses: int = 5
    """Guesses for each token."""
    candidates: int = Field(default=32, ge=2)
    """Tokens that are tried at each position."""
    sweeps: int = Field(default=2, ge=1)
    """Over the whole text, where rows depend on later tokens."""

    def recover(self, known: Knowledge, chain: Chain, seen: Sequence[Tensor]) -> list[Tensor]:
        """The candidates that are likeliest."""
        search = known.likeliest(chain)
        unigram = ((known.frequency.float() + 0.1) / (known.frequency.float() + 0.1).sum()).log()
        last: dict[str, Tensor] = {}

        def prior(ids: Tensor) -> Tensor:
            if known.prior is None or ids.shape[1] == 0:
                return unigram.expand(len(ids), -1)
            with torch.no_grad():
                return known.prior(ids).float()

        def proposals(rows: Tensor, ids: Tensor) -> Tensor:
            expected = prior(ids)
            last["expected"] = expected
            half = self.candidates // 2
            joint = (expected[:, known.tokens] - search.distances(rows) / 2).topk(min(half, len(known.tokens))).indices
            return known.tokens[torch.cat([joint, search.top(rows, self.candidates - half)], dim=1)]

        def cost(distances: Tensor, candidates: Tensor, ids: Tensor) -> Tensor:
            expected = last["expected"] if known.causal else unigram.expand(len(candidates), -1)
            return chain.surprise(distances) - expected.gather(1, candidates)

        return match(known, chain, seen, proposals, cost, sweeps=self.sweeps, guesses=self.guesses)
