"""The contract of guards: onion layers around what a party sends, each in its own file, each saying what it protects from whom.

A row guard changes the first result before it leaves the party: rows (..., d), one for each token. It works on the FORWARD
values only. The party's own backward pass goes through it as through any layer: noise is a constant, a clip has its Jacobian.
The gradient that the owner sends back is a function of what it was sent, so it costs no further privacy; what the party sends
back (gradients at label positions, when labels stay home) is NOT guarded by a row guard.
An update guard hides a party's update of a round from whoever adds the updates up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from deltaloom.errors import SettingsError
from deltaloom.private.accountant import Cost
from deltaloom.private.messages import Crossing, GuardContext
from deltaloom.registry import class_named, names_in
from deltaloom.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from deltaloom.private.guards._noise import Noise

PACKAGE = "deltaloom.private.guards"
CERTAIN = 1e6  # per unit of distance: outweighs any prior
CROSSINGS: tuple[Crossing, ...] = ("hidden", "gradient")


class Guard(Settings, ABC):
    """One layer of protection."""

    name: ClassVar[str]
    protects: ClassVar[str]
    """What from whom, in a sentence."""
    leaves: ClassVar[str]
    """What stays open, in a sentence."""


class RowGuard(Guard):
    """A guard of the rows (..., d) of one kind of crossing."""

    crossing: Literal["hidden", "gradient"] = "hidden"
    """Which rows: hidden states at the cut, or the gradients of outputs that a party sends back when labels stay home."""

    @abstractmethod
    def protect(self, x: Tensor, noise: Noise) -> Tensor:
        """What is sent instead of `x`: same shape, dtype and device; differentiable in `x`, with the noise as a constant."""

    @abstractmethod
    def centre(self, x: Tensor) -> Tensor:
        """What is sent on average, without noise: what an attacker, who knows these settings, can compute."""

    def cost(self, radius: float | None) -> Cost:
        """What one release of one row costs, if no row entering this guard has a norm above `radius` (None: unknown)."""
        return Cost()

    def surprise(self, distance: Tensor) -> Tensor | None:
        """Negative log density, up to a constant, of noise of these norms; None if this guard draws none."""
        return None

    def radius(self, before: float | None) -> float | None:
        """The largest norm of a row that leaves, given that of rows that enter; None: unbounded."""
        return None


class Chain:
    """Row guards in order, with the party's noise key: a `messages.Guard`.

    Raises:
        SettingsError: more than one of them draws noise on one crossing (what a second one adds cannot be stated), or one
        guards no rows.
    """

    def __init__(self, guards: Sequence[Guard], key: bytes) -> None:
        wrong = [guard.name for guard in guards if not isinstance(guard, RowGuard)]
        if wrong:
            raise SettingsError("this guards updates, not rows", got=wrong[0], legal=names_in(PACKAGE))
        self._key = key
        self.guards = tuple(guard for guard in guards if isinstance(guard, RowGuard))
        for crossing in CROSSINGS:
            noisy = [guard.name for guard, cost in self._costs(crossing) if cost.promised]
            if len(noisy) > 1:
                raise SettingsError(f"more than one guard draws noise on one crossing ({crossing})", got=noisy,
                                    hint="Keep one of them, with more noise.")

    @property
    def name(self) -> str:
        """The guards' names, innermost first."""
        return "+".join(guard.name for guard in self.guards) or "none"

    def _of(self, crossing: Crossing) -> tuple[RowGuard, ...]:
        return tuple(guard for guard in self.guards if guard.crossing == crossing)

    def _costs(self, crossing: Crossing) -> list[tuple[RowGuard, Cost]]:
        radius: float | None = None
        costs = []
        for guard in self._of(crossing):
            costs.append((guard, guard.cost(radius)))
            radius = guard.radius(radius)
        return costs

    def cost(self, crossing: Crossing = "hidden") -> Cost:
        """What one release of one row costs; what follows the noise cannot make it more."""
        return next((cost for _, cost in self._costs(crossing) if cost.promised), Cost())

    def outgoing(self, tensor: Tensor, context: GuardContext) -> Tensor:
        """What is sent instead of rows (..., d). The same rows at the same step and micro-batch give the same bytes again."""
        from deltaloom.private.guards._noise import Noise
        place = f"{context.scope}/{context.crossing}/{context.phase}/{context.key.step}/{context.key.micro}"
        for layer, guard in enumerate(self._of(context.crossing)):
            tensor = guard.protect(tensor, Noise(self._key, place, layer, tensor))
        return tensor

    def surprise(self, distance: Tensor) -> Tensor:
        """How unlikely noise of these norms is at the cut; without noise any distance is next to impossible."""
        noisy = (guard.surprise(distance) for guard in self._of("hidden"))
        return next((found for found in noisy if found is not None), distance * CERTAIN)

    def centre(self, x: Tensor, crossing: Crossing = "hidden") -> Tensor:
        """What is sent on average."""
        for guard in self._of(crossing):
            x = guard.centre(x)
        return x


@dataclass(frozen=True)
class Answer:
    """What a party answers in a phase of a round: tensors by name (bytes travel as uint8), and the samples it used."""

    tensors: Mapping[str, Tensor]
    count: int = 0


@dataclass(frozen=True)
class Roll:
    """What has been answered in a round: phase -> party -> answer; `label` names round and attempt, unlike any other."""

    label: str
    parties: tuple[str, ...]
    answers: Mapping[str, Mapping[str, Answer]] = field(default_factory=dict)
    layout: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class UpdateGuard(Guard):
    """A guard of a party's update; the coordinator's half is a set of pure functions of what has been answered."""

    phases: ClassVar[tuple[str, ...]]
    """What a party answers, in order; each phase is for those who answered the one before."""

    @abstractmethod
    def needed(self, parties: int) -> int:
        """The fewest parties with which a phase may close, of `parties` that began."""

    @abstractmethod
    def check(self, roll: Roll, phase: str, party: str, answer: Answer) -> None:
        """Refuse an answer that cannot belong here.

        Raises:
            DataError: it is malformed; nothing is changed.
        """

    @abstractmethod
    def told(self, roll: Roll, phase: str, party: str) -> dict[str, Tensor]:
        """What the coordinator tells a party, for it to answer `phase`."""

    @abstractmethod
    def mean(self, roll: Roll) -> dict[str, Tensor]:
        """The weighted mean of the updates of all who answered every phase that matters, float64."""

    @abstractmethod
    def half(self, party: str, label: str, secret: bytes) -> PartyHalf:
        """The party's half for the round and attempt that `label` names; `secret`: 32 bytes that stay at the party."""


class PartyHalf(ABC):
    """What a party does in a guarded round.

    Its answers depend on nothing but what is passed in, except that it refuses to answer twice what may be answered once: so
    `state_dict()` goes to disk before an answer leaves.
    """

    @abstractmethod
    def answer(self, phase: str, told: Mapping[str, Mapping[str, Tensor]], tensors: Mapping[str, Tensor], count: int) -> Answer:
        """The answer to a phase. `told`: what the coordinator told for it and for the phases before, by phase; `tensors` and
        `count`: the update and its samples, needed for the phase in which it is sent."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values without secrets."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave, of the same round.

        Raises:
            CheckpointError: it is of another round.
        """


def guard_named(name: str) -> type[Guard]:
    """The class of a guard's settings, by its name.

    Raises:
        SettingsError: unknown; names the legal ones.
    """
    return class_named(PACKAGE, name, Guard, "guard")


def parse_guards(values: object, where: str = "guards") -> tuple[Guard, ...]:
    """Guards from a list of mappings `{guard: NAME, ...}` of a run file or policy.

    Raises:
        SettingsError: no list, an unknown guard, or settings that it does not have.
    """
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise SettingsError(f"{where} must be a list of mappings", got=values, legal="[{guard: NAME, ...}, ...]")
    guards = []
    for index, value in enumerate(values):
        given: dict[Any, Any] = dict(value)
        name = given.pop("guard", None)
        if not isinstance(name, str):
            raise SettingsError(f"{where}.{index} names no guard", got=value, legal=names_in(PACKAGE),
                                hint="Write {guard: NAME, ...}.")
        guards.append(guard_named(name).parse(given, f"{where}.{index}"))
    return tuple(guards)
