"""Structured pruning of attention heads: every attention becomes narrower, and the result is a plain model.

A head of keys and values goes with all query heads that read it (rows of q, k, v, columns of o), the same number in every
block, so that the configuration (num_attention_heads, num_key_value_heads, head_dim) describes what is left. Families whose
heads are as wide as their number says (GPT-2, BERT) cannot state that and are refused. Importance, choice and refit: see
_prune.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from transformers import PreTrainedModel

from deltaloom.compress._prune import UnitCompressor
from deltaloom.compress._units import Units, head_numbers, heads_of
from deltaloom.errors import RefusedError


class PruneHeads(UnitCompressor):
    """Fewer heads."""

    name: ClassVar[str] = "prune-heads"
    calibrates: ClassVar[bool] = True

    def units(self, model: PreTrainedModel) -> list[Units]:
        """Heads of keys and values, with their query heads."""
        return heads_of(model)

    def kept_count(self, each: Units) -> int:
        """All but the share, to the nearest whole head."""
        kept = each.count - round(each.count * self.share)
        if not 0 < kept < each.count:
            raise RefusedError("no head would be removed, or all of them", got=f"share {self.share} of {each.count}",
                               legal=[f"{gone / each.count:.2f}" for gone in range(1, each.count)],
                               hint="Heads of keys and values go as a whole, with the query heads that read them.")
        return kept

    def numbers(self, model: PreTrainedModel, units: Sequence[Units]) -> dict[str, int]:
        """The numbers of heads, and their width."""
        return head_numbers(model, units, self.kept_count(units[0]))
