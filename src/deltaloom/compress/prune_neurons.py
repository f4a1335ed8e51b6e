"""Structured pruning of neurons: the feed-forward layers of all blocks become narrower, and the result is a plain model.

A neuron goes with its row of up (and gate) and its column of down, the same number in every block, so that the configuration
(intermediate_size, n_inner, d_ff) describes what is left. Importance, choice and refit: see _prune.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from transformers import PreTrainedModel

from deltaloom.compress._prune import UnitCompressor
from deltaloom.compress._units import Units, neuron_numbers, neurons_of
from deltaloom.errors import RefusedError


class PruneNeurons(UnitCompressor):
    """Fewer neurons."""

    name: ClassVar[str] = "prune-neurons"
    calibrates: ClassVar[bool] = True

    multiple: int = Field(8, ge=1, description="of which the number of neurons that stay is a multiple")

    def units(self, model: PreTrainedModel) -> list[Units]:
        """Neurons."""
        return neurons_of(model)

    def kept_count(self, each: Units) -> int:
        """The share that stays, to the nearest multiple."""
        kept = round(each.count * (1 - self.share) / self.multiple) * self.multiple
        if not 0 < kept < each.count:
            raise RefusedError("no neuron would be removed, or all of them", got=f"share {self.share} of {each.count} neurons",
                               hint=f"What stays is a multiple of {self.multiple}: change the share, or `multiple`.")
        return kept

    def numbers(self, model: PreTrainedModel, units: Sequence[Units]) -> dict[str, int]:
        """The inner width."""
        return neuron_numbers(model, units, self.kept_count)
