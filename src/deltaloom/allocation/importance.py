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


def mean_of_rows(scores: Tensor) -> Tensor:
    """(rows,): AdaLoRA's score of a vector, the same whatever its length is."""
    return scores.flatten(1).mean(1) if scores.ndim > 1 else scores


def sum_of_rows(scores: Tensor) -> Tensor:
    """(rows,): what a row is worth in all; divided by its cost it is the mean of its numbers, of whatever tensors they are."""
    return scores.flatten(1).sum(1) if scores.ndim > 1 else scores


GATHERINGS: dict[str, Callable[[Tensor], Tensor]] = {"mean": mean_of_rows, "sum": sum_of_rows}


class Importance:
    """The running averages of a list of parameters; the same order every time.

    They are kept in one piece: a method may have hundreds of small parameters, each of which would cost as much as all.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], sensitivity: str, beta1: float, beta2: float) -> None:
        self.parameters = list(parameters)
        self.sensitivity = SENSITIVITIES[sensitivity]
        self.beta1, self.beta2 = beta1, beta2
        like = self.parameters[0].detach()
        self._smoothness, self._uncertainty = like.new_zeros(2, sum(p.numel() for p in self.parameters))

    @property
    def smoothness(self) -> list[Tensor]:
        """The averages of the sensitivity, in the parameters' shapes; views."""
        return self._apart(self._smoothness)

    @property
    def uncertainty(self) -> list[Tensor]:
        """The averages of how far the sensitivity is from its average, in the parameters' shapes; views."""
        return self._apart(self._uncertainty)

    @torch.no_grad()
    def observe(self) -> None:
        """Take in the parameters as they are and their gradients; a parameter without one counts as having zeros."""
        weights = [p.detach() for p in self.parameters]
        found = self.sensitivity(weights, [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters])
        now = torch.cat([part.reshape(-1) for part in found])
        self._smoothness.mul_(self.beta1).add_(now, alpha=1 - self.beta1)
        gap = now.sub_(self._smoothness).abs_()
        self._uncertainty.mul_(self.beta2).add_(gap, alpha=1 - self.beta2)

    def scores(self) -> list[Tensor]:
        """Importance of every number, in the parameters' shapes."""
        return self._apart(self._smoothness * self._uncertainty)

    def state_dict(self) -> dict[str, Any]:
        """Both averages, in the parameters' order."""
        return {"smoothness": self._smoothness, "uncertainty": self._uncertainty}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._smoothness = state["smoothness"].to(self._smoothness.device).clone()
        self._uncertainty = state["uncertainty"].to(self._uncertainty.device).clone()

    def _apart(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split([p.numel() for p in self.parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]
