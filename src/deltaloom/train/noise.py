"""The gradient noise scale, from the micro-batches that a step has anyway.

    B = tr(S) / |G|^2

S is the covariance of the gradient of one token or row, G its mean (McCandlish et al. 2018, arXiv 1812.06162). A step has m
micro-batches with summed gradients g_i over c_i tokens or rows, C of them together. With small = sum_i |g_i|^2 / c_i / C and
big = |sum_i g_i|^2 / C^2 the expectations are |G|^2 + m tr(S) / C and |G|^2 + tr(S) / C, so that
tr(S) = (small - big) C / (m - 1) and |G|^2 = big - tr(S) / C without bias. Both are averaged before they are divided.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class NoiseMeter:
    """Sums over the steps since the last reading. Costs a copy of the deltas' gradients and reads nothing from the device."""

    def __init__(self) -> None:
        self._before: list[Tensor] | None = None
        self._small: list[Tensor] = []
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._steps = 0
        self._sums: Tensor | list[float] = [0.0, 0.0, 0.0]  # of tr(S), |G|^2 and C

    def after_micro_batch(self, parameters: Sequence[nn.Parameter], count: Tensor | float) -> None:
        """Note the gradients that a micro-batch of `count` tokens or rows has added to those before."""
        now = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        own = now if self._before is None else torch._foreach_sub(now, self._before)
        squares = torch.stack(torch._foreach_norm(own)).square().sum()
        number = torch.as_tensor(count, dtype=torch.float32, device=squares.device)
        self._before = now
        self._small.append(squares / number.clamp_min(1e-12))  # one without targets has no gradient either

    def parts(self) -> tuple[Tensor | float, int]:
        """(sum_i |g_i|^2 / c_i, m) of the micro-batches noted since the last step: what several processes add up."""
        found = torch.stack(self._small).sum() if self._small else 0.0, len(self._small)
        self.drop()
        return found

    def after_step(self, parts: tuple[Tensor | float, int], gradients: Sequence[Tensor], count: Tensor | float) -> None:
        """Take in a step from its `parts`, its summed gradients, and its tokens or rows; a single micro-batch says nothing."""
        small, number = parts
        if number < 2 or not gradients:
            return
        squares = torch.stack(torch._foreach_norm(list(gradients))).square().sum()
        total = torch.as_tensor(count, dtype=torch.float32, device=squares.device)
        big = squares / total.square()
        trace = (small / total - big) * total / (number - 1)
        values = torch.stack((trace, big - trace / total, total)).double()
        self._sums = values + (self._sums if isinstance(self._sums, Tensor) else values.new_tensor(self._sums))
        self._steps += 1

    def drop(self) -> None:
        """Forget the micro-batches of a step that is not taken."""
        self._before, self._small = None, []

    def read(self) -> tuple[float | None, float | None]:
        """(noise scale, tokens or rows of a step), on the mean over the steps; None where no step had several micro-batches.

        A signal that drowns in the noise, |G|^2 at or below zero, counts as a scale that is infinite.
        """
        if not self._steps:
            return None, None
        trace, signal, total = self._list()
        return (trace / signal if signal > 0 else float("inf")), total / self._steps

    def state(self) -> list[float]:
        """What a checkpoint keeps."""
        return [*self._list(), float(self._steps)]

    def load(self, state: Sequence[float]) -> None:
        """Take back what `state` gave."""
        self._sums, self._steps = list(state[:3]), int(state[3])

    def _list(self) -> list[float]:
        return self._sums.tolist() if isinstance(self._sums, Tensor) else list(self._sums)
