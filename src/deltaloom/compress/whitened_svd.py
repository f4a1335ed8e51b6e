"""The truncated SVD of each weight in the norm of the layer's outputs on calibration rows: SVD-LLM's truncation.

    min over rank r of  sum over inputs x of ||W x - W' x||^2:    W' = left right,  left = U_r,  right = U_r^T W

U are the eigenvectors of W G W^T with G the Gram matrix of the inputs (see linalg/matrix.py, which also says why no Cholesky
factor has to be inverted). Blocks are compressed in order, each for the inputs that the compressed ones before it give.

Source: Wang et al., "SVD-LLM: Truncation-aware singular value decomposition for large language model compression"
(ICLR 2025). The budget within groups of one role is as in SVD-LLM V2 (2025), the rule for sharing it is our own.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from deltaloom.compact.face import affine_weight
from deltaloom.compress._calibration import calibrated
from deltaloom.compress._layers import dense_layer
from deltaloom.compress._lowrank import LowRankCompressor, factor, layer_record, summed_facts
from deltaloom.compress.base import Facts, Work
from deltaloom.linalg.matrix import best_of_rank, output_directions, ridged


class WhitenedSVD(LowRankCompressor):
    """Truncated SVD for the inputs that occur."""

    name: ClassVar[str] = "whitened-svd"
    calibrates: ClassVar[bool] = True

    ridge: float = Field(1e-3, ge=0, description="added to the inputs' Gram matrix, as a share of its mean diagonal")

    def apply(self, work: Work) -> Facts:
        """Greedy ranks take a first pass over the untouched model for the energies of all layers."""
        model = work.model
        sites = self.sites(model)
        energies: dict[str, Tensor] = {}
        if self.ranks != "uniform":
            for block in calibrated(model, work.batches, sites, gram=True):
                for path, inputs in block.items():
                    weight = affine_weight(dense_layer(model, path))
                    energies[path] = output_directions(weight, ridged(inputs.product(), self.ridge))[0]
        ranks = self.chosen_ranks(sites, energies)
        records = []
        for block in calibrated(model, work.batches, [site for site in sites if site.path in ranks], gram=True):
            for path, inputs in block.items():
                weight = affine_weight(dense_layer(model, path))
                left, right = best_of_rank(weight, ranks[path], ridged(inputs.product(), self.ridge))
                records.append(layer_record(path, weight, left, right, inputs.product()))
                factor(model, path, left, right)
            work.say(f"Factored {len(records)} of {len(ranks)} layers")
        return summed_facts(records, sites, model)
