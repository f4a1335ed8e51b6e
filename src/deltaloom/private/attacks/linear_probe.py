"""Linear probe: Gaussian classes with one covariance (Fisher's linear discriminant), learned from public text.

    score_v(z) = z' S^-1 m_v - m_v' S^-1 m_v / 2 + log p_v

m_v: mean row of token v, p_v its frequency, S: covariance of guarded rows around these means. For Gaussian noise that drowns
what the context does, no attack on single rows with these frequencies does better; without any evidence it says the most
frequent token. The means are those of the noise-free guard, since noise is zero on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deltaloom.private.attacks._nearest import BLOCK, classes_of
from deltaloom.private.attacks.base import Knowledge, TokenAttack, sent
from deltaloom.private.guards.base import Chain


class LinearProbe(TokenAttack):
    """Linear scores of the tokens that the public text shows."""

    name: ClassVar[str] = "linear-probe"

    guesses: int = 5
    """Guesses for each token."""
    ridge: float = Field(default=1e-4, gt=0)
    """Added to the covariance, as a share of its mean diagonal."""

    def recover(self, known: Knowledge, chain: Chain, seen: Sequence[Tensor]) -> list[Tensor]:
        """The tokens with the highest scores of every row."""
        tokens, places = classes_of(known.public)
        counts = torch.bincount(places).double()
        centres = torch.cat([chain.centre(row) for row in known.hidden]).double()
        guarded = torch.cat(sent(chain, known.hidden)).double()
        means = torch.zeros(len(tokens), centres.shape[1], dtype=torch.float64).index_add_(0, places, centres) / counts[:, None]
        residual = guarded - means[places]
        covariance = residual.T @ residual / max(1, len(places) - len(tokens))
        covariance += torch.eye(len(covariance)).double() * (self.ridge * covariance.diagonal().mean() + 1e-12)
        weights = torch.linalg.solve(covariance, means.T)  # (d, classes)
        bias = (counts / counts.sum()).log() - (means.T * weights).sum(0) / 2
        few = min(self.guesses, len(tokens))
        return [torch.cat([tokens[(part.double() @ weights + bias).topk(few).indices] for part in row.split(BLOCK)])
                for row in seen]
