"""The contract of means: how the updates of a round become one; pure functions in float64."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltaloom.registry import class_named
from deltaloom.settings import Settings

PACKAGE = "deltaloom.private.means"


@dataclass(frozen=True)
class Weighed:
    """One party's values of a round in float64, and the samples it used in it."""

    tensors: Mapping[str, Tensor]
    count: int


class Mean(Settings, ABC):
    """One way to make one update of several."""

    name: ClassVar[str]

    @abstractmethod
    def needed(self) -> int:
        """The fewest updates that it can be taken of."""

    @abstractmethod
    def combine(self, updates: Sequence[Weighed]) -> dict[str, Tensor]:
        """The common values, float64; the updates come ordered by party, so that arrival does not matter."""


def mean_named(name: str) -> type[Mean]:
    """The class of a mean's settings, by its name.

    Raises:
        SettingsError: unknown; names the legal ones.
    """
    return class_named(PACKAGE, name, Mean, "mean")  # type: ignore[type-abstract]
