"""One basis for the layers of one role in several neighbouring blocks, and coefficients for each of them.

    layers that read the hidden states (q, k, v, gate, up):     W_l ~ C_l B,   B (r, d_in) shared,  C_l (d_out, r)
    layers that write them (o, down):                            W_l ~ A C_l,   A (d_out, r) shared, C_l (r, d_in)

n layers cost r (d_in + n d_out), or r (n d_in + d_out), in the place of n r (d_in + d_out): a higher rank at the same size.
Each layer runs through its own r, so that it is no faster than one of that rank, and above d_in d_out / (d_in + d_out) slower
than the dense layer.

A is the best there is, the leading eigenvectors of sum_l W_l G_l W_l^T / e_l with G_l the Gram matrix of the layer's inputs and
e_l the energy of its outputs. B is the same of the stacked [W_l], for the mean of the G_l (each over its trace), with C_l
refitted to the layer's own inputs. Blocks are compressed in order, each group for the inputs that those before it give.

Source: Wang et al., "Basis Sharing: Cross-layer parameter sharing for large language model compression" (ICLR 2025), which
shares bases of inputs; a Tucker-1 decomposition of the stacked weights. A truncated t-SVD of them stores as many numbers for
the same ranks, but lets every layer run through the sum of all ranks, and pays only where layers are alike. Those of SmolLM2-135M
are not (v: 7% of the energy is common to all 30 layers, 3% if nothing is): with 80% of the numbers the relative error of the v
weights is 0.333 layer by layer, and 0.337, 0.352 and 0.416 by the transforms `data`, `haar` and `dct` of linalg/transforms.py.
Neither do its pairs of blocks gain by a basis: at a ratio of 0.8 perplexity 18.6, and 14.8 by `whitened-svd`. Compare both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaloom.architectures import split_path
from deltaloom.compact import FactoredLinear
from deltaloom.compact.face import affine_weight
from deltaloom.compress._calibration import calibrated
from deltaloom.compress._layers import OnlyBlocks, TargetLayers, dense_layer, dense_sites, put_layer
from deltaloom.compress._lowrank import layer_record, summed_facts
from deltaloom.compress.base import Compressor, Facts, Work
from deltaloom.errors import RefusedError
from deltaloom.linalg.matrix import best_of_rank, leading, refitted_left, ridged
from deltaloom.sites import Site

WRITERS = ("o", "down")


class SharedBasis(Compressor):
    """Low rank with a basis that several layers share."""

    name: ClassVar[str] = "shared-basis"
    calibrates: ClassVar[bool] = True

    targets: TargetLayers = "all-linear"
    layers: OnlyBlocks = None
    ratio: float = Field(0.8, gt=0, lt=1, description="kept parameters of the target layers, as a share")
    blocks: int = Field(2, ge=2, description="neighbouring blocks that share")
    ridge: float = Field(1e-3, ge=0, description="added to the inputs' Gram matrices, as a share of their mean diagonals")

    def sites(self, model: PreTrainedModel) -> list[Site]:
        """The target layers; errors as `dense_sites`."""
        return dense_sites(model, self.targets, self.layers)

    def sketch(self, model: PreTrainedModel) -> None:
        """Empty factors."""
        for group, rank in self._groups(self.sites(model)):
            weight = affine_weight(dense_layer(model, group[0].path))
            shared = weight.new_empty((weight.shape[0], rank) if _writes(group[0]) else (rank, weight.shape[1]))
            owned = (rank, weight.shape[1]) if _writes(group[0]) else (weight.shape[0], rank)
            _put(model, group, shared, [weight.new_empty(owned) for _ in group])

    def apply(self, work: Work) -> Facts:
        """As many blocks at a time as share."""
        model, records = work.model, []
        sites = self.sites(model)
        ranks = {tuple(site.path for site in group): rank for group, rank in self._groups(sites)}
        by_path = {site.path: site for site in sites}
        for block in calibrated(model, work.batches, sites, gram=True, span=self.blocks):
            for paths, rank in ranks.items():
                if paths[0] in block:
                    records += self._share(model, [by_path[path] for path in paths], rank,
                                           {path: block[path].product() for path in paths})
            work.say(f"Factored {len(records)} of {len(sites)} layers")
        return summed_facts(records, sites, model)

    def _groups(self, sites: Sequence[Site]) -> list[tuple[list[Site], int]]:
        """Layers that share, with their rank.

        Raises:
            RefusedError: the ratio leaves layers no rank, or more than they have.
        """
        layers = {stack: sorted({site.layer or 0 for site in sites if site.stack == stack}) for stack in
                  dict.fromkeys(site.stack for site in sites)}
        groups: dict[object, list[Site]] = {}
        for site in sites:
            place = layers[site.stack].index(site.layer or 0) // self.blocks
            groups.setdefault((site.stack, place, split_path(site.path)[2], site.d_out, site.d_in), []).append(site)
        found, bad = [], []
        for group in groups.values():
            d_out, d_in, count = group[0].d_out, group[0].d_in, len(group)
            cost = count * d_in + d_out if _writes(group[0]) else d_in + count * d_out
            rank = min(int(self.ratio * count * d_in * d_out / cost + 1e-9), d_in, d_out)
            if rank < 1:
                least = f"({d_out} x {d_in}): a rank of 1 keeps {cost / (count * d_in * d_out):.2f}"
                bad += [f"{site.path} {least}" for site in group]
            found.append((group, rank))
        if bad:
            raise RefusedError("the ratio leaves layers no rank", got=self.ratio, problems=bad[:8],
                               hint="Keep a larger ratio, or leave these layers out of the targets.")
        return found

    def _share(self, model: nn.Module, group: list[Site], rank: int, products: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Factor the layers of a group; their records."""
        weights = [affine_weight(dense_layer(model, site.path)).detach().double() for site in group]
        grams = [ridged(products[site.path], self.ridge) for site in group]
        if _writes(group[0]):
            outer = torch.stack([weight @ gram @ weight.T for weight, gram in zip(weights, grams, strict=True)])
            shared = leading((outer / _positive(_traces(outer))).sum(0), rank)
            owned = [shared.T @ weight for weight in weights]
            pairs = [(shared, own) for own in owned]
        else:
            several = torch.stack(grams)
            common = (several / _positive(_traces(several))).sum(0)
            scaled = [weight / _positive(((weight @ common) * weight).sum()).sqrt() for weight in weights]
            shared = best_of_rank(torch.cat(scaled), rank, common)[1]
            owned = [refitted_left(weight, shared, gram) for weight, gram in zip(weights, grams, strict=True)]
            pairs = [(own, shared) for own in owned]
        records: list[dict[str, Any]] = [
            {**layer_record(site.path, weight, left, right, products[site.path]), "shared_by": len(group)}
            for site, weight, (left, right) in zip(group, weights, pairs, strict=True)]
        for record in records:
            own, common_size = owned[0].numel(), shared.numel()
            record["kept"] = (own + common_size / len(group)) / weights[0].numel()
        _put(model, group, shared, owned)
        return records


def _writes(site: Site) -> bool:
    return site.role in WRITERS


def _traces(matrices: Tensor) -> Tensor:
    """(n, d, d) -> (n, 1, 1)"""
    return matrices.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]


def _positive(value: Tensor) -> Tensor:
    return value.clamp(min=torch.finfo(torch.float64).tiny)


def _put(model: nn.Module, group: Sequence[Site], shared: Tensor, owned: Sequence[Tensor]) -> None:
    """Factored layers in the places of a group, in their type; the shared factor is one parameter."""
    weight = affine_weight(dense_layer(model, group[0].path))
    one = nn.Parameter(shared.to(weight.dtype).contiguous(), requires_grad=False)
    for site, own in zip(group, owned, strict=True):
        layer, mine = dense_layer(model, site.path), own.to(weight.dtype).contiguous()
        right, left = (mine, one) if _writes(site) else (one, mine)
        put_layer(model, site.path, FactoredLinear(right, left, layer.bias))
