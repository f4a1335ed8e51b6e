"""Zeros in weights: which entries to keep by a score, without structure or n of every m columns."""

from __future__ import annotations

import re
from abc import ABC
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor
from transformers import PreTrainedModel

from deltaloom.compress._layers import OnlyBlocks, TargetLayers, dense_sites
from deltaloom.compress._lowrank import relative
from deltaloom.compress.base import Compressor, Facts
from deltaloom.errors import RefusedError
from deltaloom.sites import Site

PATTERN = re.compile(r"([1-9]\d{0,3}):([1-9]\d{0,3})")


class MaskCompressor(Compressor, ABC):
    """What the compressors that set entries to zero share. Nothing changes its shape: files stay as large as they were."""

    targets: TargetLayers = "all-linear"
    layers: OnlyBlocks = None
    sparsity: float | str = Field(0.5, description="share of zeros, or n:m to keep n of every m columns of a row")

    @field_validator("sparsity")
    @classmethod
    def _sensible(cls, value: float | str) -> float | str:
        if isinstance(value, str):
            found = PATTERN.fullmatch(value)
            if not found or not int(found[1]) < int(found[2]):
                raise ValueError("a share between 0 and 1, or n:m with n less than m, such as 2:4")
        elif not 0 < value < 1:
            raise ValueError("a share of zeros is between 0 and 1")
        return value

    def sites(self, model: PreTrainedModel) -> list[Site]:
        """The target layers; errors as `dense_sites`."""
        return dense_sites(model, self.targets, self.layers)

    def checked_sites(self, model: PreTrainedModel) -> list[Site]:
        """The target layers.

        Raises:
            RefusedError: rows that are no multiple of m, all of them at once.
        """
        sites = self.sites(model)
        if isinstance(self.sparsity, str):
            m = int(self.sparsity.split(":")[1])
            odd = [f"{site.path}: {site.d_in} columns" for site in sites if site.d_in % m]
            if odd:
                raise RefusedError(f"rows do not divide into groups of {m}", got=self.sparsity, problems=odd[:8],
                                   hint="Choose another pattern, or leave these layers out of the targets.")
        return sites

    def sketch(self, model: PreTrainedModel) -> None:
        """Only checks: zeros weigh what other numbers weigh."""
        self.checked_sites(model)

    def mask(self, scores: Tensor) -> Tensor:
        """Which entries (rows, d_in) to keep: the highest scores of each row, or of every m columns of it."""
        return kept(scores, self.sparsity)


@torch.no_grad()
def kept(scores: Tensor, sparsity: float | str) -> Tensor:
    """A mask (rows, d_in): of each row all but floor(sparsity * d_in) entries, or the n highest of every m; ties: the earlier."""
    rows, d_in = scores.shape
    if isinstance(sparsity, str):
        n, m = (int(part) for part in sparsity.split(":"))
        groups, keep = scores.reshape(rows * (d_in // m), m), n
    else:
        groups, keep = scores, d_in - int(sparsity * d_in)
    order = groups.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(1, order[:, :keep], True).reshape(rows, d_in)


@torch.no_grad()
def zeroed_record(path: str, weight: Tensor, mask: Tensor, squares: Tensor | None) -> dict[str, Any]:
    """The report's record of a layer: its share of zeros and the relative errors.

    `squares` (d_in,), the inputs' summed squares, give the error of the outputs as it would be with uncorrelated inputs.
    """
    lost = weight.double() * ~mask
    record = {"layer": path, "zeros": float((weight * mask == 0).sum()) / weight.numel(),
              "weight_error": relative(float(lost.square().sum()), float(weight.double().square().sum()))}
    if squares is not None:
        record["diagonal_output_error"] = relative(float((lost.square() * squares).sum()),
                                                   float((weight.double().square() * squares).sum()))
    return record


def zero_facts(records: list[dict[str, Any]]) -> Facts:
    """Facts of pruned layers, with the note that nothing became smaller."""
    means = {f"mean_{key}": sum(record[key] for record in records) / len(records) for key in ("zeros", "weight_error")}
    return Facts(records, means, ["zeros are stored like other numbers: the files are as large and the model as fast as before"])
