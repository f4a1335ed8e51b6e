"""Gradients are mostly noise: advice on the size of a step."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from deltaloom.train.rules.base import Decision, Recommend, Rule, Seen


class Noise(Rule):
    """Compares the gradient noise scale with the size of a step; measured where a step has several micro-batches.

    B = tr(S) / |G|^2, S the covariance of the gradient of one token or row and G its mean: in a step of B of them noise and
    signal are equally large. McCandlish et al. 2018 (arXiv 1812.06162). It advises and changes nothing: larger steps cost
    more, and whether that is worth it is not seen here.
    """

    name: ClassVar[str] = "noise"
    order: ClassVar[int] = 5
    steers: ClassVar[bool] = False

    above: float = Field(4.0, gt=0, description="how many times a step's size the noise scale may be")

    def decide(self, seen: Seen) -> Decision | None:
        """Recommend larger steps, once."""
        if seen.acted or seen.noise is None or not seen.batch or seen.noise <= self.above * seen.batch:
            return None
        times = min(seen.noise / seen.batch, 64.0)
        return Decision([Recommend(f"train.batch_size (or batch_tokens) about {times:.2g} times as large, or a lower rate")],
                        f"the gradient noise scale is about {seen.noise:.3g} learned tokens or rows, a step has {seen.batch:.3g}")
