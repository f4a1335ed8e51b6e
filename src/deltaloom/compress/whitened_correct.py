"""A low-rank correction of the quantisation error in the norm of the layer's outputs on calibration rows.

    W ~ Q + left right,    min over the rank of  sum over inputs x of ||(W - Q - left right) x||^2

Follows a step that quantises; W is the untouched model's weight. The truncation is that of `whitened-svd`, of W - Q. Blocks are
corrected in order, each for the inputs that the corrected ones before it give.

Source: the norm as in Zhang et al., "QERA: an analytical framework for quantization error reconstruction" (ICLR 2025).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from deltaloom.compress._calibration import calibrated
from deltaloom.compress._correction import Correction, correct
from deltaloom.compress._rounding import bits_figures
from deltaloom.compress.base import Facts, Work


class WhitenedCorrect(Correction):
    """The truncated SVD of the error, for the inputs that occur."""

    name: ClassVar[str] = "whitened-correct"
    calibrates: ClassVar[bool] = True

    ridge: float = Field(1e-3, ge=0, description="added to the inputs' Gram matrix, as a share of its mean diagonal")

    def apply(self, work: Work) -> Facts:
        """Block by block."""
        sites = self.sites(work.model)
        weights, facts = self.untouched(work, sites), Facts()
        for block in calibrated(work.model, work.batches, sites, gram=True):
            for path, inputs in block.items():
                facts.layers.append(correct(work.model, path, weights[path], self.rank, inputs.product(), self.ridge))
            work.say(f"Corrected {len(facts.layers)} of {len(sites)} layers")
        facts.figures |= bits_figures(facts.layers)
        return facts
