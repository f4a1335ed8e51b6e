"""Clip: no row is longer than a given norm.

    z = x min(1, norm / |x|)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from torch import Tensor

from deltaloom.private.guards._rows import clipped
from deltaloom.private.guards.base import RowGuard

if TYPE_CHECKING:
    from deltaloom.private.guards._noise import Noise


class Clip(RowGuard):
    """Rows longer than `norm` are shortened to it.

    Protects, alone, nothing from nobody: it bounds what one token can contribute, which noise needs to be worth something.
    Leaves the direction of every row, from which tokens are recovered as well as without it.
    """

    name: ClassVar[str] = "clip"
    protects: ClassVar[str] = "Alone nothing from nobody; it bounds one token's row, without which noise promises nothing."
    leaves: ClassVar[str] = "The direction of every row, from which tokens are recovered as well as without it."

    norm: float = Field(gt=0)
    """The largest Euclidean norm of a row, in units of the activations at the cut."""

    def protect(self, x: Tensor, noise: Noise) -> Tensor:
        """The clipped rows; nothing is drawn."""
        return self.centre(x)

    def centre(self, x: Tensor) -> Tensor:
        """The clipped rows."""
        return clipped(x, self.norm).to(x.dtype)

    def radius(self, before: float | None) -> float | None:
        """The norm, or what entered if that was shorter."""
        return self.norm if before is None else min(before, self.norm)
