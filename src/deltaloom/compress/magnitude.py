"""Magnitude pruning: the smallest entries of each weight become zero, the baseline.

    keep the largest |W_ij| of the whole matrix, or n of every m columns of a row

The weights keep their shapes: neither file nor time shrinks without kernels for sparse weights, which this does not bring.
"""

from __future__ import annotations

from typing import ClassVar

from deltaloom.compact.face import affine_weight
from deltaloom.compress._layers import dense_layer, put_weight
from deltaloom.compress._masks import MaskCompressor, zero_facts, zeroed_record
from deltaloom.compress.base import Facts, Work


class Magnitude(MaskCompressor):
    """Zeros by absolute value."""

    name: ClassVar[str] = "magnitude"

    def apply(self, work: Work) -> Facts:
        """Layer by layer."""
        records = []
        for site in self.checked_sites(work.model):
            layer = dense_layer(work.model, site.path)
            weight = affine_weight(layer).detach()
            scores = weight.float().abs()
            mask = self.mask(scores) if isinstance(self.sparsity, str) else self.mask(scores.reshape(1, -1)).reshape(scores.shape)
            records.append(zeroed_record(site.path, weight, mask, None))
            put_weight(layer, weight * mask)
        return zero_facts(records)
