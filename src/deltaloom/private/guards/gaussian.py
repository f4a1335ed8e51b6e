"""Gaussian noise on every row, after clipping: the analytic Gaussian mechanism, one row at a time.

    z = x min(1, norm / |x|) + s g,    g ~ N(0, 1)^d

Any two clipped rows differ by at most 2 norm, so one release of one row is (2 norm / s)-Gaussian-private, and s follows from
(epsilon, delta) by Balle & Wang 2018 (arXiv 1805.06530), which is exact where the classical formula is a loose bound that
holds for epsilon below 1 only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor

from deltaloom.private.accountant import Cost, gaussian_mu
from deltaloom.private.guards._rows import as_constant, clipped
from deltaloom.private.guards.base import RowGuard

if TYPE_CHECKING:
    from deltaloom.private.guards._noise import Noise


class Gaussian(RowGuard):
    """Clipped rows with Gaussian noise: give `sigma`, or `epsilon` and `delta` for one release of one row.

    Protects each row, from the owner and from whoever reads its memory: two texts cannot be told apart by one row better than
    (epsilon, delta) says. Leaves what many rows tell together: the rows of one text depend on one another and a text is sent
    once an epoch; the ledger states both sums. Moderate noise hides little: measure it with the attacks.
    """

    name: ClassVar[str] = "gaussian"
    protects: ClassVar[str] = "Each token's row from the owner: no two rows can be told apart better than (epsilon, delta) says."
    leaves: ClassVar[str] = ("What the rows of one text tell together, and over repeated epochs: the ledger states these sums, "
                             "and they grow with the square root of the number of rows.")

    norm: float = Field(gt=0)
    """The norm that rows are clipped to, in units of the activations at the cut."""
    sigma: float | None = Field(default=None, gt=0)
    """Standard deviation of the noise in each coordinate, in the same units."""
    epsilon: float | None = Field(default=None, gt=0)
    """For one release of one row; with `delta`, instead of `sigma`."""
    delta: float | None = Field(default=None, gt=0, lt=1)
    """The probability with which epsilon may fail, far below one over the number of tokens."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.epsilon is None) != (self.delta is None) or (self.sigma is None) == (self.epsilon is None):
            raise ValueError("give either sigma, or epsilon and delta")
        return self

    @property
    def deviation(self) -> float:
        """The noise's standard deviation in each coordinate."""
        if self.epsilon is not None and self.delta is not None:
            return 2 * self.norm / gaussian_mu(self.epsilon, self.delta)
        return float(self.sigma or 0.0)

    def protect(self, x: Tensor, noise: Noise) -> Tensor:
        """Clipped rows with noise."""
        drawn = as_constant(self.deviation * noise.normal(x.numel()), x)
        return (clipped(x, self.norm) + drawn).to(x.dtype)

    def centre(self, x: Tensor) -> Tensor:
        """The clipped rows."""
        return clipped(x, self.norm).to(x.dtype)

    def surprise(self, distance: Tensor) -> Tensor:
        """Squares."""
        return distance**2 / (2 * self.deviation**2)

    def cost(self, radius: float | None) -> Cost:
        """Two rows differ by twice the norm, or by twice what entered if that was shorter."""
        return Cost(mu=2 * min(self.norm, radius or self.norm) / self.deviation)
