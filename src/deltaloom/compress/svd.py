"""The truncated SVD of each weight: the best of its rank in the Frobenius norm (Eckart and Young), the baseline.

    W (d_out, d_in) ~ left right,    left = U_r (d_out, r), right = U_r^T W (r, d_in)

It does not know which inputs occur, and loses far more than `whitened-svd` at the same size.
"""

from __future__ import annotations

from typing import ClassVar

from deltaloom.compact.face import affine_weight
from deltaloom.compress._layers import dense_layer
from deltaloom.compress._lowrank import LowRankCompressor, factor, layer_record, summed_facts
from deltaloom.compress.base import Facts, Work
from deltaloom.linalg.matrix import best_of_rank, output_directions


class SVD(LowRankCompressor):
    """Truncated SVD, without calibration."""

    name: ClassVar[str] = "svd"

    def apply(self, work: Work) -> Facts:
        """Energies of all layers, ranks, factors."""
        model = work.model
        sites = self.sites(model)
        weights = {site.path: affine_weight(dense_layer(model, site.path)) for site in sites}
        energies = {} if self.ranks == "uniform" else {path: output_directions(weight)[0] for path, weight in weights.items()}
        records = []
        for path, rank in self.chosen_ranks(sites, energies).items():
            left, right = best_of_rank(weights[path], rank)
            records.append(layer_record(path, weights[path], left, right, None))
            factor(model, path, left, right)
        return summed_facts(records, sites, model)
