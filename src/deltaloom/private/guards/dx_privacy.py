"""Metric privacy (d_x-privacy) of every row: noise whose density falls as exp(-eta |z|).

    z = x + r u,    u uniform on the unit sphere of R^d,    r ~ Gamma(shape d, scale 1 / eta)

For rows x, x' every output is at most exp(eta |x - x'|) times likelier under one than under the other (Chatzikokolakis et al.
2013; Feyisetan et al. 2020, arXiv 1910.08902). The radius is ONE draw for each row, a sum of d exponentials, and its mean is
d / eta; drawing every coordinate on its own gives another distribution with no such promise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor

from deltaloom.private.accountant import Cost
from deltaloom.private.guards._rows import as_constant
from deltaloom.private.guards.base import RowGuard

if TYPE_CHECKING:
    from deltaloom.private.guards._noise import Noise


class DxPrivacy(RowGuard):
    """Noise by a metric: near rows are hard to tell apart, far ones may stay easy.

    Protects each row, from the owner, in proportion to distance: which of two near rows was sent. Leaves far rows apart: no
    epsilon can be stated for all pairs unless a `clip` guard stands before it. Releases add up: eta of a row sent ten times is
    ten eta.
    """

    name: ClassVar[str] = "dx-privacy"
    protects: ClassVar[str] = "Which of two near rows was sent, from the owner: odds change by at most exp(eta x distance)."
    leaves: ClassVar[str] = "Which of two far rows was sent; eta adds up over releases and over the rows of a text."

    eta: float = Field(gt=0)
    """Privacy per unit of Euclidean distance; the noise has mean norm d / eta. Smaller is more noise."""

    def protect(self, x: Tensor, noise: Noise) -> Tensor:
        """Rows with noise of a random direction and one random radius each."""
        width = x.shape[-1]
        direction = noise.normal(x.numel()).reshape(-1, width)
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        radius = -np.log(noise.uniform(x.numel())).reshape(-1, width).sum(axis=1, keepdims=True) / self.eta
        return (x.double() + as_constant(direction * radius, x)).to(x.dtype)

    def centre(self, x: Tensor) -> Tensor:
        """The rows themselves."""
        return x

    def surprise(self, distance: Tensor) -> Tensor:
        """The distance itself."""
        return distance * self.eta

    def cost(self, radius: float | None) -> Cost:
        """`eta`, and a bounded distance if the rows were clipped before."""
        return Cost(eta=self.eta, diameter=None if radius is None else 2 * radius)
