"""A low-rank correction of the quantisation error, without data: ZeroQuant-V2's low-rank compensation.

    W ~ Q + left right,    left right the best approximation of W - Q of its rank in the Frobenius norm

Follows a step that quantises; W is the untouched model's weight, so that what other steps before it lost is made up for too.
`whitened-correct` weighs the error by the inputs that occur, and is better where rows to calibrate on are at hand.

Source: Yao et al., "ZeroQuant-V2" (2023, arXiv 2303.08302).
"""

from __future__ import annotations

from typing import ClassVar

from deltaloom.compress._correction import Correction, correct
from deltaloom.compress._rounding import bits_figures
from deltaloom.compress.base import Facts, Work


class Correct(Correction):
    """The truncated SVD of the error beside each quantised weight."""

    name: ClassVar[str] = "correct"

    def apply(self, work: Work) -> Facts:
        """Layer by layer."""
        sites = self.sites(work.model)
        weights, facts = self.untouched(work, sites), Facts()
        for site in sites:
            facts.layers.append(correct(work.model, site.path, weights[site.path], self.rank))
        facts.figures |= bits_figures(facts.layers)
        return facts
