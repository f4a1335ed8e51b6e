"""Importance of trained numbers, from the smoothness and the uncertainty of their gradients.

    I_t  = |w g|  or  |g|                                   sensitivity of a number w with the loss gradient g
    Ib_t = beta1 Ib_{t-1} + (1 - beta1) I_t                 smoothness
    Ub_t = beta2 Ub_{t-1} + (1 - beta2) |I_t - Ib_t|        uncertainty, with the new smoothness
    s_t  = Ib_t Ub_t                                        importance; all averages start at zero, without bias correction

Zhang et al. 2023 (AdaLoRA, arXiv 2303.10512), eqs. 9-11, as in its code. |w g| estimates what the loss loses when w is set to
zero; |g| alone says something already while w is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Sensitivity = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


def weight_gradient(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """|w g| of each number."""
    found = torch._foreach_mul(list(weights), list(gradients))
    torch._foreach_abs_(found)
    return found


def gradient(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """|g| of each number."""
    return torch._foreach_abs(list(gradients))


SENSITIVITIES: dict[str, Sensitivity] = {"weight-gradient": weight_gradient, "gradient": gradient}


class Importance:
    """The running averages of a list of parameters; the same order every time."""

    def __init__(self, parameters: Sequence[nn.Parameter], sensitivity: str, beta1: float, beta2: float) -> None:
        self.parameters = list(parameters)
        self.sensitivity = SENSITIVITIES[sensitivity]
        self.beta1, self.beta2 = beta1, beta2
        self.smoothness = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        self.uncertainty = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]

    @torch.no_grad()
    def observe(self) -> None:
        """Take in the parameters as they are and their gradients; a parameter without one counts as having zeros."""
        weights = [p.detach() for p in self.parameters]
        found = list(self.sensitivity(weights, [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]))
        torch._foreach_mul_(self.smoothness, self.beta1)
        torch._foreach_add_(self.smoothness, found, alpha=1 - self.beta1)
        gap = torch._foreach_sub(found, self.smoothness)
        torch._foreach_abs_(gap)
        torch._foreach_mul_(self.uncertainty, self.beta2)
        torch._foreach_add_(self.uncertainty, gap, alpha=1 - self.beta2)

    def scores(self) -> list[Tensor]:
        """Importance of every number, in the parameters' shapes."""
        return list(torch._foreach_mul(self.smoothness, self.uncertainty))

    def state_dict(self) -> dict[str, Any]:
        """Both averages, in the parameters' order."""
        return {"smoothness": list(self.smoothness), "uncertainty": list(self.uncertainty)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for own, saved in ((self.smoothness, state["smoothness"]), (self.uncertainty, state["uncertainty"])):
            for index, tensor in enumerate(saved):
                own[index] = tensor.to(self.parameters[index].device).clone()
