"""What the compressors that remove units share: importance, the choice, making up for what goes, and the removal.

    importance of unit u:   sum over inputs x of ||W_u x_u||^2 = tr(W_u G_uu W_u^T)

x_u are the columns of the unit in the layer W (d_out, d_in) that reads it, G = sum of x x^T over the calibration tokens. What
remains of W is refitted to the outputs of the whole layer by least squares, with a ridge towards what it was:

    W'_K = (W G_:K + c W_K) (G_KK + c I)^-1,    c = ridge * mean diagonal of G

Sources: the importance is that of Wanda (Sun et al., ICLR 2024) summed over a unit, with the correlations within it; the
refit is that of a linear layer's inputs in Frantar and Alistarh, "Optimal Brain Compression" (NeurIPS 2022), for a set at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from deltaloom.compact.face import affine_weight
from deltaloom.compress._calibration import calibrated
from deltaloom.compress._layers import dense_layer, put_weight
from deltaloom.compress._lowrank import relative
from deltaloom.compress._units import Cut, Units, shrink
from deltaloom.compress.base import Compressor, Facts, Work
from deltaloom.errors import RefusedError
from deltaloom.linalg.matrix import output_error
from deltaloom.sites import Site, all_sites


class UnitCompressor(Compressor, ABC):
    """Removes the units that matter least, the same number in every block."""

    share: float = Field(0.2, gt=0, lt=1, description="units to remove, as a share of those of each block")
    ridge: float = Field(1e-2, ge=0, description="of the refit of what remains, as a share of the inputs' mean square")

    @abstractmethod
    def units(self, model: PreTrainedModel) -> list[Units]:
        """The units of all blocks."""

    @abstractmethod
    def kept_count(self, each: Units) -> int:
        """How many units of a sub-layer stay.

        Raises:
            RefusedError: none or all of them.
        """

    @abstractmethod
    def numbers(self, model: PreTrainedModel, units: Sequence[Units]) -> dict[str, int]:
        """The configuration's keys with their new values."""

    def sketch(self, model: PreTrainedModel) -> None:
        """As many units fewer; which ones makes no difference to the shapes."""
        units = self.units(model)
        cut = Cut({each.leave: torch.arange(self.kept_count(each)) for each in units}, self.numbers(model, units))
        shrink(model, units, cut)

    def apply(self, work: Work) -> Facts:
        """A pass over the untouched model for the importances, one block by block for the refits, then the removal."""
        model, units = work.model, self.units(work.model)
        by_path = {each.leave: each for each in units}
        sites = [site for site in all_sites(model) if site.kind == "linear" and site.part is None and site.path in by_path]
        scores = importances(work, sites, by_path)
        cut = Cut(self._chosen(units, scores), self.numbers(model, units))
        facts = Facts()
        for block in calibrated(model, work.batches, sites, gram=True):
            for path, inputs in block.items():
                layer, columns = dense_layer(model, path), by_path[path].columns(cut.kept[path])
                weight = affine_weight(layer).detach().clone()
                columns, gram = columns.to(weight.device), inputs.product()
                put_weight(layer, refitted(weight, gram, columns, self.ridge))
                lost = weight.double() - affine_weight(layer).detach().double()
                share = scores[path][cut.kept[path]].sum() / scores[path].sum().clamp(min=1e-300)
                facts.layers.append({"layer": path, "units": by_path[path].count, "kept": len(cut.kept[path]),
                                     "kept_importance": float(share),
                                     "output_error": relative(output_error(lost, gram), output_error(weight, gram))})
            work.say(f"Chose units of {len(facts.layers)} of {len(units)} layers")
        shrink(model, units, cut)
        facts.figures = {"units_before": units[0].count, "units_after": self.kept_count(units[0]),
                         "mean_output_error": sum(record["output_error"] for record in facts.layers) / len(facts.layers)}
        return facts

    def _chosen(self, units: Sequence[Units], scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """The most important units of each block; of blocks that have to agree, by the sums of their shares."""
        pooled: dict[str, Tensor] = {}
        for each in units:
            share = scores[each.leave] / scores[each.leave].sum().clamp(min=1e-300)
            pooled[each.together] = pooled[each.together] + share if each.together in pooled else share
        return {each.leave: pooled[each.together].argsort(descending=True, stable=True)[:self.kept_count(each)].sort().values
                for each in units}


def importances(work: Work, sites: Sequence[Site], units: dict[str, Units]) -> dict[str, Tensor]:
    """The importance (count,) of the units that each layer reads, on the model as it is; float64."""
    found = {}
    for block in calibrated(work.model, work.batches, sites, gram=True):
        for path, inputs in block.items():
            weight = affine_weight(dense_layer(work.model, path)).detach().double()
            each = units[path]
            parts = weight.reshape(len(weight), each.count, each.width).transpose(0, 1)          # (count, d_out, width)
            blocks = inputs.product().reshape(each.count, each.width, each.count, each.width)
            own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)                               # (count, width, width)
            found[path] = ((parts @ own) * parts).sum((1, 2)).clamp(min=0).cpu()
    return found


@torch.no_grad()
def refitted(weight: Tensor, gram: Tensor, columns: Tensor, ridge: float) -> Tensor:
    """A weight (d_out, d_in) that is zero outside of these columns, whose outputs are the nearest to the whole one's.

    Columns that no input reaches keep their weights, whatever the ridge.
    """
    whole = weight.detach().double()
    damping = ridge * gram.diagonal().mean()
    if float(damping) == 0:
        damping = torch.finfo(torch.float64).eps * gram.diagonal().max().clamp(min=1e-300)
    inner = gram[columns][:, columns].clone()
    inner.diagonal().add_(damping)
    target = whole @ gram[:, columns] + damping * whole[:, columns]
    lower, failed = torch.linalg.cholesky_ex(inner)
    if int(failed):
        raise RefusedError("the inputs of a layer are so alike that what remains of it cannot be refitted",
                           got=f"ridge {ridge}", hint="Give a larger ridge, or more calibration rows.")
    out = torch.zeros_like(whole)
    out[:, columns] = torch.cholesky_solve(target.T, lower).T
    return out
