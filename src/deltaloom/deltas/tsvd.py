"""t-SVD tensor delta: the increments of all layers stacked in one tensor, in skinny t-SVD form, its rank decided while training.

    D = U * S * V^T,     change of layer l = scale * sqrt(d_out) * sum_f weights[f, l] * U_f diag(s_f) V_f^T

Layers of one role and shape, in order of depth, are a group; their N increments are the slices of a tensor D (N, d_out, d_in).
A transform over the layers (`transform`) writes each slice as a weighted sum of matrices D_f that the group shares, one for each
frequency f, and D_f is kept as its SVD: U_f (d_out, r_f), V_f (d_in, r_f) with orthonormal columns, coefficients s_f (r_f,).
With `dft` this is the skinny t-SVD, * being the t-product; D_f is complex, and conjugate frequencies are kept once, as real
and imaginary parts. Other orthonormal transforms have the same algebra; `identity` makes N independent changes.
D is never formed: a layer's change is low-rank, with the vectors of all frequencies that reach it (all N of `dft`, `dct`, `data`
and `learned`, at most 1 + log2 N of `haar`, two of `frame`, one of `identity`); time grows with that number, parameters do not.

U_f, V_f start orthonormal and s_f at zero, so that nothing changes at birth. After each step U_f, V_f are pulled back towards
orthonormal ones (`penalty`, `orthogonality`). An entry is one (f, index), that is one coefficient with its two vectors: from the
smoothness and the uncertainty of its gradients comes its importance, and from the importance now and at the decision before, how
many entries stay (`rule`). The others are silenced; they may come back until the last decision, and are then removed. `rank` is
the mean over layers, and the budget is the parameters of so many entries, over all groups together.

`preset: literal` is the form closest to the t-SVD as it is defined: dft, tubes, the share rule (which has no budget: ranks are
what the scores say), |g|, and the penalty in the loss; settings beside it win. Unlike a matrix method this one also takes
convolution kernels, the parameters of experts, and registered layers, if the targets name them (`all`, or their names).
Kilmer & Martin 2011 (t-SVD); Kernfeld, Kilmer & Aeron 2015 (other transforms); importance and schedule: Zhang et al. 2023
(AdaLoRA, arXiv 2303.10512). With `identity`, `rule: budget` and the penalty in the loss it is AdaLoRA with the squared penalty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from deltaloom.allocation import Schedule
from deltaloom.deltas._adaptive import AdaptiveMethod, Policy, Pool, RankController
from deltaloom.deltas._orthogonality import squared_penalty
from deltaloom.deltas._tensor_group import GradientGram, Member, TensorGroup, grouped
from deltaloom.deltas.base import (
    AttachContext,
    Attachment,
    Controller,
    Delta,
    LowRankDelta,
    StepPlan,
    WarmUp,
    shapes_at,
)
from deltaloom.errors import SettingsError
from deltaloom.sites import Kind, Site

LITERAL = {"transform": "dft", "granularity": "tube", "rule": "share", "importance": "gradient", "penalty": "loss"}


class TsvdDelta(LowRankDelta):
    """One layer's slice of a group's tensor."""

    def __init__(self, group: TensorGroup, layer: int, dropout: float, share: float) -> None:
        super().__init__()
        self.held = (group,)  # in a tuple: the group is registered once, beside the deltas
        self.layer = layer
        self.dropout = dropout
        self.share = share

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The columns that reach this layer, with its coefficients."""
        return self.held[0].factors(self.layer)

    def rounded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """The group's vectors, where all of them reach this layer as they are."""
        return self.held[0].rounded(self.layer, dtype)

    def penalty(self) -> Tensor | None:
        """The whole group's, at its first layer."""
        return self.share * self.held[0].triplets.penalty(squared_penalty) if self.share and self.layer == 0 else None

    def orthogonality(self) -> float | None:
        """The group's largest deviation from orthonormal factors."""
        return self.held[0].triplets.residual()


class TsvdStackDelta(Delta):
    """Several slices of a group's tensor: those of a parameter that is a stack of matrices."""

    def __init__(self, group: TensorGroup, layers: range, tensor: str, share: float) -> None:
        super().__init__()
        self.held = (group,)
        self.layers = layers
        self.tensor = tensor
        self.share = share

    def increments(self) -> dict[str, Tensor]:
        """The slices (slices, d_out, d_in) of the parameter."""
        return {self.tensor: torch.stack([self.held[0].slice(layer) for layer in self.layers])}

    def penalty(self) -> Tensor | None:
        """The whole group's, at its first layer."""
        return self.share * self.held[0].triplets.penalty(squared_penalty) if self.share and self.layers[0] == 0 else None

    def orthogonality(self) -> float | None:
        """The group's largest deviation from orthonormal factors."""
        return self.held[0].triplets.residual()


class TSVD(AdaptiveMethod):
    """The t-SVD tensor delta."""

    name: ClassVar[str] = "tsvd"
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "stack")

    transform: Literal["identity", "dft", "dct", "haar", "data", "learned", "frame"] = "haar"
    """Over the layers. `identity` shares nothing; `dft` and `dct` suit changes that are smooth in depth, `haar` blocks of layers;
    `data` finds one from the gradients of a few batches, `learned` trains it from `haar` on; `frame` adds what all layers share
    to what each has (overcomplete, so not a t-SVD in the strict sense)."""
    granularity: Literal["entry", "tube"] = "entry"
    """What is kept or dropped: single entries (frequency, index), or a tube, which is an index at all frequencies together (so
    that every frequency of a group has one rank, the tubal rank)."""
    rule: Literal["capped", "budget", "share", "effective", "fixed"] = "capped"
    """From scores to ranks. `capped`: the effective number of entries within the schedule's limits. `budget`: the schedule alone.
    `share`: all that reach a tenth of the previous mean score. `effective`: the effective number alone. `fixed`: ranks stay as
    they are, at `rank`. Only the first two keep the budget."""
    scale: float = Field(2.0, gt=0)
    """Factor of the change, in units of sqrt(d_out), the same whatever the ranks are. Vectors have the norm 1: in these units a
    coefficient moves the outputs as fast as a number of LoRA's B does where alpha over rank is this factor."""
    penalty: Literal["decoupled", "loss"] = "decoupled"
    """How U_f and V_f are kept orthonormal: by a step of their own after the optimizer's, which neither the loss nor the
    importance sees, or by a penalty in the loss, ||U_f^H U_f - I||^2 averaged over both sides of all layers of the method (of one
    group with `dft`: the mean of ||U^T * U - I||^2 and ||V^T * V - I||^2)."""
    orthogonality: float = Field(0.1, ge=0)
    """Strength of that step (0.5 is one of Newton-Schulz's; below 1), or coefficient of the penalty."""
    warm_up_batches: int = Field(4, ge=1)
    """Batches whose gradients `data` looks at before the first step."""

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "preset" not in values:
            return values
        if values["preset"] != "literal":
            raise ValueError(f"the preset must be 'literal', got {values['preset']!r}")
        return LITERAL | {key: value for key, value in values.items() if key != "preset"}

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.penalty == "decoupled" and self.orthogonality >= 1:
            raise ValueError(f"orthogonality: a step of 1 or more leads away from orthonormal ones, got {self.orthogonality:g}")
        if self.rule == "fixed" and self.rank != int(self.rank):
            raise ValueError(f"with rule 'fixed' every frequency has the same rank, a whole number, got {self.rank:g}")
        return self

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """One group for each role and shape, and every layer's slice of it.

        Raises:
            SettingsError: a rank that a layer cannot have; a setting that stacks cannot follow.
        """
        rank = self.initial_rank() if self.rule != "fixed" else int(self.rank)
        self.check_ranks(sites, rank)
        self._check_stacks(sites)
        found = grouped(sites)
        share = self.orthogonality / (2 * sum(len(members) for members in found.values())) if self.penalty == "loss" else 0.0
        deltas: dict[Site, Delta] = {}
        shared: dict[str, nn.Module] = {}
        for name, members in found.items():
            group = TensorGroup(self.transform, len(members), rank, members[0].site, self.scale, context)
            shared[name] = group
            for place, (site, count) in Member.runs(members):
                deltas[site] = (TsvdDelta(group, place, self.dropout, share) if site.kind == "linear" else
                                TsvdStackDelta(group, range(place, place + count), site.tensor, share))
        return Attachment({site: deltas[site] for site in sites}, shared)

    def _check_stacks(self, sites: Sequence[Site]) -> None:
        stacks = [site.name for site in sites if site.kind == "stack"]
        asked = [f"{key} {value}" for key, value, asks in (("transform", "data", self.transform == "data"),
                                                           ("dropout", self.dropout, self.dropout > 0)) if asks]
        if stacks and asked:
            raise SettingsError(f"{self.name}: this needs the inputs of affine layers, and a stack's are not seen",
                                got=", ".join(asked), problems=stacks[:20],
                                hint="Choose another setting, or leave these stacks out of the targets.")

    def controller(self, attachment: Attachment, plan: StepPlan) -> Controller | None:
        """Ranks under one budget over all groups, counted in parameters; and orthonormal factors.

        Raises:
            SettingsError: the budget is less than the largest entry or tube takes.
        """
        groups = {name: group for name, group in attachment.shared.items() if isinstance(group, TensorGroup)}
        strength = self.orthogonality if self.penalty == "decoupled" else 0.0
        pools = [_pool(name, group, self.granularity) for name, group in groups.items()]
        if self.rule == "fixed":
            return RankController(pools, None, plan, strength) if strength else None
        schedule = Schedule.of_run(plan.total_steps, self.start, self.end, self.every)
        target = sum(self.rank * group.layers * group.cost for group in groups.values())
        largest = max(_largest(pool) for pool in pools)
        if self.rule in ("budget", "capped") and target < largest * (1 - 1e-9):
            raise SettingsError(f"{self.name}: the budget is too small to keep anything", got=f"{target:.0f} parameters",
                                legal=f"at least {largest:.0f}, which is one {self.granularity}", hint="Raise rank.")
        policy = Policy(self.rule, self.importance, self.beta1, self.beta2, schedule, target, "frequency")
        return RankController(pools, policy, plan, strength)

    def warm_up(self, attachment: Attachment) -> WarmUp | None:
        """For `data`, the Gram matrices of the layers' gradients."""
        if self.transform != "data":
            return None
        places = {site: (delta.held[0], delta.layer) for site, delta in attachment.deltas.items() if isinstance(delta, TsvdDelta)}
        return GradientGram(places, self.warm_up_batches)

    def fit(self, attachment: Attachment, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The ranks of the saved tensors."""
        for name, group in attachment.shared.items():
            if isinstance(group, TensorGroup):
                group.triplets.fit(shapes_at(shapes, f"shared.{name}:triplets."))


def _largest(pool: Pool) -> float:
    """The most numbers that are kept or dropped together."""
    numbers = pool.terms.numbers().cpu()
    unit = torch.arange(len(numbers)) if pool.tube is None else pool.tube().cpu()
    return float(torch.bincount(unit, numbers).max()) if len(numbers) else 0.0


def _pool(name: str, group: TensorGroup, granularity: str) -> Pool:
    triplets = group.triplets
    if granularity == "entry":
        return Pool(triplets, name, row=lambda: triplets.block)
    return Pool(triplets, name, row=lambda: triplets.block, tube=group.index, weight=triplets.rows_of)
