"""Wanda: entries whose product of weight and input norm is small become zero, row by row.

    score_ij = |W_ij| ||x_j||,    ||x_j|| the norm of input j over the tokens of the calibration rows

Each output row loses the same share, or keeps n of every m columns. Blocks are pruned in order, each for the inputs that the
pruned ones before it give. Nothing is updated besides. The weights keep their shapes (see `magnitude`).

Source: Sun et al., "A simple and effective pruning approach for large language models" (ICLR 2024).
"""

from __future__ import annotations

from typing import ClassVar

from deltaloom.compact.face import affine_weight
from deltaloom.compress._calibration import calibrated
from deltaloom.compress._layers import dense_layer, put_weight
from deltaloom.compress._masks import MaskCompressor, zero_facts, zeroed_record
from deltaloom.compress.base import Facts, Work


class Wanda(MaskCompressor):
    """Zeros by weight times input norm."""

    name: ClassVar[str] = "wanda"
    calibrates: ClassVar[bool] = True

    def apply(self, work: Work) -> Facts:
        """Block by block."""
        records = []
        sites = self.checked_sites(work.model)
        for block in calibrated(work.model, work.batches, sites, gram=False):
            for path, inputs in block.items():
                layer = dense_layer(work.model, path)
                weight = affine_weight(layer).detach()
                mask = self.mask(weight.double().abs() * inputs.squares.sqrt())
                records.append(zeroed_record(path, weight, mask, inputs.squares))
                put_weight(layer, weight * mask)
            work.say(f"Pruned {len(records)} of {len(sites)} layers")
        return zero_facts(records)
