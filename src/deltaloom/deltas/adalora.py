"""AdaLoRA: low-rank changes in SVD form, with the ranks of all layers decided while training under one budget.

    y = W x + b + scale * P diag(l) Q x,     scale = alpha / (initial rank + 1e-5)

Reparameterisation-based delta tuning. P (d_out, r) and Q (r, d_in) start Gaussian with deviation 0.02, l at zero; a penalty
mean(||P^T P - I||, ||Q Q^T - I||) keeps them near orthonormal ones. A triplet's importance is s(l) + mean s(P's column) +
mean s(Q's row); every few steps the triplets with the best scores of all layers stay within a budget that falls from the
initial to the final one on a cubic curve, and the others' l is set to zero, from where they may come back. In the last part of
the run the ranks are fixed and what is masked is removed from memory.
Zhang et al. 2023 (arXiv 2303.10512), as in its code, which PEFT has too. Differences to PEFT 0.21: triplets of equal scores do
not all fall together (all would at the start, where every score is zero); the penalty is reported apart from the loss; removed
triplets no longer pull on the others through the penalty; what is saved has its true ranks; the run's length is not asked for.
`penalty: squared` is the paper's squared norm, its code has the norm itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from deltaloom.allocation import Schedule
from deltaloom.compact.face import is_conv1d
from deltaloom.deltas._adaptive import AdaptiveMethod, Policy, Pool, RankController, group_names
from deltaloom.deltas._orthogonality import sum_of_penalties
from deltaloom.deltas._peft import PEFT_COMMON, by_suffix, peft_targets, refuse_fields, whole_sites
from deltaloom.deltas._triplets import Triplets
from deltaloom.deltas.base import (
    AttachContext,
    Attachment,
    Controller,
    LowRankDelta,
    PeftPart,
    PeftReading,
    StepPlan,
    shapes_at,
)
from deltaloom.errors import CheckpointError, RefusedError
from deltaloom.sites import Site

PEFT_TYPE = "ADALORA"
SUFFIXES = {"down": ".lora_A", "core": ".lora_E", "up": ".lora_B"}
PEFT_READ = PEFT_COMMON | {"r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "init_lora_weights", "target_r", "init_r",
                           "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "rank_pattern",
                           "use_rslora", "ensure_weight_tying"}
PEFT_NEUTRAL = {"megatron_core": ("megatron.core",), "qalora_group_size": (16,)}


class AdaLoraDelta(LowRankDelta):
    """P diag(l) Q at one site, as rank-one terms."""

    def __init__(self, triplets: Triplets, scale: float, dropout: float) -> None:
        super().__init__()
        self.triplets = triplets
        self.scale = scale
        self.dropout = dropout
        self.penalised: tuple[tuple[Triplets, ...], float, bool] | None = None  # all sites', at the first one

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q, scale * l, P."""
        return self.triplets.down, self.triplets.core_now() * self.scale, self.triplets.up.T

    def penalty(self) -> Tensor | None:
        """That of all sites, at the first one: the mean over all P and Q of how far they are from orthonormal."""
        if self.penalised is None:
            return None
        sites, share, root = self.penalised
        matrices = [matrix for triplets in sites if len(triplets.core) for matrix in (triplets.up, triplets.down)]
        return share * sum_of_penalties(matrices, root) if matrices else None

    def orthogonality(self) -> float | None:
        """The larger deviation of P and Q from orthonormal ones."""
        return self.triplets.residual()


class AdaLoRA(AdaptiveMethod):
    """Low-rank adaptation with adaptive ranks."""

    name: ClassVar[str] = "adalora"
    peft_types: ClassVar[tuple[str, ...]] = (PEFT_TYPE,)

    alpha: float = Field(32.0, gt=0)
    """Numerator of the scale; its denominator is the initial rank, also when ranks change."""
    orthogonality: float = Field(0.5, ge=0)
    """Coefficient of the penalty."""
    penalty: Literal["norm", "squared"] = "norm"
    """The norm of the deviation, as in the authors' code, or its square, as in the paper."""

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """P, l and Q for every site."""
        rank = self.initial_rank()
        self.check_ranks(sites, rank)
        deltas: dict[Site, AdaLoraDelta] = {}
        for site in sites:
            up, down = torch.zeros(rank, site.d_out), torch.zeros(rank, site.d_in)
            if not context.loading:
                down.normal_(0.0, 0.02, generator=context.generator)
                up.normal_(0.0, 0.02, generator=context.generator)
            deltas[site] = AdaLoraDelta(Triplets(up, down), self.scale(), self.dropout)
        if self.orthogonality:
            every = tuple(delta.triplets for delta in deltas.values())
            deltas[sites[0]].penalised = every, self.orthogonality / (2 * len(sites)), self.penalty == "norm"
        return Attachment(dict(deltas))

    def scale(self) -> float:
        """alpha over the initial rank, with the small number that the authors' code adds to it."""
        return self.alpha / (self.initial_rank() + 1e-5)

    def controller(self, attachment: Attachment, plan: StepPlan) -> Controller | None:
        """Ranks under one budget over all sites, counted in ranks as in the paper."""
        schedule = Schedule.of_run(plan.total_steps, self.start, self.end, self.every)
        names = group_names(list(attachment.deltas))
        pools = [_pool(site, names[site], delta.triplets) for site, delta in attachment.deltas.items()
                 if isinstance(delta, AdaLoraDelta)]
        target = max(1, int(self.rank * len(pools) + 1e-9))
        policy = Policy("budget", self.importance, self.beta1, self.beta2, schedule, target, "layer")
        return RankController(pools, policy, plan)

    def fit(self, attachment: Attachment, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The ranks of the saved tensors."""
        for site, delta in attachment.deltas.items():
            if isinstance(delta, AdaLoraDelta):
                delta.triplets.fit(shapes_at(shapes, f"{site.name}:triplets."))

    def to_peft(self, attachment: Attachment, model: nn.Module) -> PeftPart:
        """lora_A, lora_E and lora_B of every layer, of the ranks that are left, with PEFT's pattern of what was kept.

        Raises:
            RefusedError: a part of a fused layer, which PEFT can only change as a whole.
        """
        parts = [site.name for site in attachment.deltas if site.part is not None]
        if parts:
            raise RefusedError("PEFT's AdaLoRA cannot change a part of a fused layer", problems=parts[:20],
                               hint="Convert to a plain low-rank delta, or keep the native format.")
        tensors: dict[str, Tensor] = {}
        pattern: dict[str, list[bool]] = {}
        for site, delta in attachment.deltas.items():
            if not isinstance(delta, AdaLoraDelta):
                raise RefusedError("not a delta of this method", got=site.name)
            triplets = delta.triplets
            stays = triplets.mask.nonzero().squeeze(1)
            values = {"down": triplets.down[stays], "core": triplets.core[stays], "up": triplets.up[stays].T}
            tensors |= {site.path + SUFFIXES[key]: tensor.detach().contiguous() for key, tensor in values.items()}
            pattern[site.path + SUFFIXES["core"]] = [index < len(stays) for index in range(self.initial_rank())]
        conv = all(is_conv1d(model.get_submodule(site.path)) for site in attachment.deltas)
        config = {"peft_type": PEFT_TYPE, "target_r": max(1, round(self.rank)), "init_r": self.initial_rank(), "bias": "none",
                  "lora_alpha": self.alpha, "lora_dropout": self.dropout, "fan_in_fan_out": conv, "beta1": self.beta1,
                  "beta2": self.beta2, "orth_reg_weight": self.orthogonality, "tinit": 0, "tfinal": 0, "total_step": 1,
                  "init_lora_weights": True, "rank_pattern": pattern, "target_modules": [site.path for site in attachment.deltas]}
        return PeftPart(config, tensors)

    @classmethod
    def from_peft(cls, adapter: PeftPart, model: nn.Module) -> PeftReading | None:
        """The triplets of PEFT's AdaLoRA, whether masked ones were removed from the file or not."""
        found = {key: by_suffix(adapter.tensors, suffix) for key, suffix in SUFFIXES.items()}
        paths = list(found["down"])
        alone = sorted(set().union(*found.values()) ^ set.intersection(*(set(tensors) for tensors in found.values())))
        if alone or not paths:
            raise CheckpointError("lora_A, lora_E and lora_B do not come in threes" if alone else "the adapter holds no lora_A",
                                  problems=alone[:20])
        refuse_fields(adapter.config, PEFT_READ, PEFT_NEUTRAL)
        sites = whole_sites(model, cls, paths)
        problems = [path for path in paths if not _fits(*(found[key][path] for key in ("down", "core", "up")))]
        if problems:
            raise CheckpointError("lora_A, lora_E and lora_B are not (r, d_in), (r, 1) and (d_out, r)", problems=problems[:20])
        config, ranks = adapter.config, [len(found["core"][path]) for path in paths]
        initial = max(_rank(config, "init_r", 12), *ranks)
        rank = min(_rank(config, "target_r", 8), initial)
        method = cls.parse({"rank": rank, "reserve": initial / rank, "alpha": config.get("lora_alpha", 8),
                            "dropout": config.get("lora_dropout") or 0.0, "orthogonality": config.get("orth_reg_weight", 0.5),
                            "beta1": config.get("beta1", 0.85), "beta2": config.get("beta2", 0.85),
                            "targets": peft_targets(config, cls, model, paths)}, "adapter_config.json")
        state = {sites[path].name: {
            "triplets.down": found["down"][path], "triplets.core": found["core"][path],
            "triplets.up": found["up"][path].T.contiguous(), "triplets.mask": _kept(config.get("rank_pattern"), path, rows)}
            for path, rows in zip(paths, ranks, strict=True)}
        return PeftReading(method, state, frozenset(path + suffix for path in paths for suffix in SUFFIXES.values()))


def _pool(site: Site, group: str, triplets: Triplets) -> Pool:
    layer = site.layer or 0
    return Pool(triplets, group, row=lambda: torch.full_like(triplets.block, layer),
                costs=lambda: torch.ones(len(triplets.core), dtype=torch.float64))


def _rank(config: Mapping[str, Any], key: str, default: int) -> int:
    found = config.get(key, default)
    if not isinstance(found, int) or found < 1:
        raise CheckpointError(f"adapter_config.json: {key} is no rank", got=found, legal="a whole number from 1")
    return found


def _kept(pattern: object, path: str, rows: int) -> Tensor:
    """The mask of a file's rows: PEFT removes what its pattern drops when it saves; a pattern of as many rows masks them."""
    found = pattern.get(path + SUFFIXES["core"]) if isinstance(pattern, Mapping) else None
    if not isinstance(found, list) or sum(map(bool, found)) == rows:
        return torch.ones(rows, dtype=torch.bool)
    if len(found) != rows:
        raise CheckpointError("rank_pattern does not fit the tensors",
                              got=f"{path}: {sum(map(bool, found))} of {len(found)} kept", legal=f"{rows} rows, as in the file",
                              hint="The file is damaged, or was put together by hand.")
    return torch.tensor(found, dtype=torch.bool)


def _fits(down: Tensor, core: Tensor, up: Tensor) -> bool:
    return down.ndim == core.ndim == up.ndim == 2 and down.shape[0] == core.shape[0] == up.shape[1] and core.shape[1] == 1
