"""What the tests of adaptive ranks share: PEFT's AdaLoRA beside ours, a watched run, and what a delta's ranks are."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import peft
import torch
from torch import Tensor, nn

from deltaloom.deltas._adaptive import RankController
from deltaloom.deltas.adalora import AdaLoRA, AdaLoraDelta
from deltaloom.deltas.base import StepPlan
from deltaloom.tuned import Tuned, attach
from tests.toys import toy

TARGETS = ["query", "value", "intermediate.dense"]


def ranks(tuned: Tuned) -> dict[str, int]:
    """Components in memory, by site."""
    return {site.name: len(delta.triplets.core) for site, delta in tuned.pairs() if isinstance(delta, AdaLoraDelta)}


def kept(tuned: Tuned) -> dict[str, int]:
    """Components that are not masked, by site."""
    return {site.name: int(delta.triplets.mask.sum()) for site, delta in tuned.pairs() if isinstance(delta, AdaLoraDelta)}


class Watched:
    """A tuned model that remembers the controllers that are made for it."""

    def __init__(self, tuned: Tuned) -> None:
        self.made: list[Any] = []
        make = tuned.controllers

        def controllers(plan: StepPlan, name: str | None = None) -> list[Any]:
            self.made[:] = make(plan, name)
            return list(self.made)

        tuned.controllers = controllers

    @property
    def controller(self) -> RankController:
        return self.made[0]


def theirs(config: dict[str, Any], model: nn.Module) -> peft.PeftModel:
    """PEFT's AdaLoRA on a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.AdaLoraConfig(target_modules=TARGETS, **config))


class Both:
    """Ours and theirs on the same tiny model with the same initial values, in float64, trained step by step.

    A BERT, because all of it computes in float64 (Llama's norms do not). Only theirs of name lora_* train: `double()` makes
    PEFT's frozen rank numbers parameters that would train too.
    """

    SUFFIX: ClassVar[dict[str, str]] = {"down": "lora_A", "core": "lora_E", "up": "lora_B"}

    def __init__(self, *, total: int = 30, start: int = 4, end: int = 10, every: int = 3, orthogonality: float = 0.5,
                 learning_rate: float = 1e-2) -> None:
        self.total = total
        method = AdaLoRA(rank=2, reserve=2, alpha=7, start=start / total, end=end / total, every=every, targets=TARGETS,
                         orthogonality=orthogonality, beta1=0.8, beta2=0.9)
        self.ours = attach(toy("bert", dtype=torch.float64), [method], seed=5).double().train()
        self.peft = theirs({"init_r": 4, "target_r": 2, "tinit": start, "tfinal": end, "deltaT": every, "total_step": total,
                            "lora_alpha": 7, "orth_reg_weight": orthogonality, "beta1": 0.8, "beta2": 0.9},
                           toy("bert", dtype=torch.float64)).double().train()
        self.their_parameters = {name: p for name, p in self.peft.base_model.model.named_parameters() if ".lora_" in name}
        with torch.no_grad():
            for key, (own, other) in self.pairs().items():
                other.copy_(own.T if key.endswith("up") else own)
        self.optimizers = [torch.optim.AdamW(values, lr=learning_rate, weight_decay=0.0)
                           for values in (self.ours.delta_parameters().values(), self.their_parameters.values())]

    def triplets(self) -> dict[str, Any]:
        return {site.name: delta.triplets for site, delta in self.ours.pairs()}

    def name(self, site: str, key: str) -> str:
        return f"{site}.{self.SUFFIX[key]}.default"

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(ours, theirs) of every parameter; theirs of `up` is transposed."""
        return {f"{site} {key}": (getattr(triplets, key), self.their_parameters[self.name(site, key)])
                for site, triplets in self.triplets().items() for key in self.SUFFIX}

    def near(self, rtol: float = 1e-12, atol: float = 1e-13, *, gradients: bool = False) -> None:
        """That all parameters agree, or all gradients."""
        for key, (own, other) in self.pairs().items():
            one, two = (own.grad, other.grad) if gradients else (own.detach(), other.detach())
            torch.testing.assert_close(one, two.T if key.endswith("up") else two, rtol=rtol, atol=atol)
