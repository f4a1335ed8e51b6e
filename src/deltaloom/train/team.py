"""The processes of one run, as the loop sees them: a team that may have one member.

Every process has the whole model and all the rows' numbers. An optimizer step's rows are dealt out, each process makes the
gradients of its own, and `Team.add` sums gradients, losses and counts over all of them: from there on every process does the
same with the same numbers, so that deltas, controllers, rules and stops agree without being sent. The first process alone
writes and speaks. With one process all of this is nothing: `SINGLE` gives back what it gets.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from deltaloom.errors import DeltaloomError, RefusedError
from deltaloom.tuned import Tuned

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Passed:
    """What the forward and backward passes of an optimizer step came to. The gradients themselves are in the parameters."""

    losses: list[Tensor]               # the summed loss of each of this process's micro-batches
    count: Tensor | float              # what the sum of all losses is divided by
    rows: list[list[int]]              # of this process's micro-batches
    tokens: int
    padded_tokens: int
    noise: tuple[Tensor | float, int] | None = None  # see `NoiseMeter.parts`
    total: Tensor | None = None        # the sum of all processes' losses; None: that of `losses`

    def loss(self) -> Tensor:
        """The summed loss of all rows of the step, fp32."""
        return (torch.stack(self.losses).sum() if self.total is None else self.total).float()


class Team(ABC):
    """The processes of a run, seen from one of them. All of them call the same methods in the same order."""

    number: int                   # of this process, from 0
    size: int
    lockstep: bool = False        # whether all have to call the model equally often, because its base is spread over them

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.number == 0

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where this process computes."""

    @abstractmethod
    def together(self, work: Callable[[], T]) -> T:
        """Do something in every process; an error in one of them is raised in all.

        Raises:
            ElsewhereError: another process failed, or is gone.
        """

    @abstractmethod
    def once(self, work: Callable[[], T]) -> T:
        """Do something in the first process while the others wait; all get its result, of a kind that a checkpoint keeps.

        Raises:
            ElsewhereError: in the others, if the first one failed.
        """

    @abstractmethod
    def add(self, work: Callable[[], Passed], parameters: Sequence[nn.Parameter]) -> Passed:
        """Make the gradients of this process's rows, and sum them and all figures over the processes.

        Raises:
            ElsewhereError: another process failed, or is gone.
        """

    @abstractmethod
    def agree(self, stop: str | None, seconds: float) -> tuple[str | None, float]:
        """(the signal that any process was asked to stop with, the first process's time): what decides whether to go on."""

    @abstractmethod
    def texts(self, own: str) -> list[str]:
        """Every process's text, in their order."""

    @abstractmethod
    def share(self, dealt: Callable[[int, int], Sequence[Sequence[int]]]) -> tuple[Sequence[Sequence[int]], int]:
        """(this process's micro-batches, how many at the end only keep step with the others and must not count).

        `dealt(number, size)` gives those of a process.
        """

    @abstractmethod
    def spread(self, items: Sequence[T], work: Callable[[T], R]) -> list[R]:
        """Results for all items in order, each made in one of the processes and ready for JSON."""

    def check_same(self, what: str, state: Mapping[str, Tensor] | str) -> None:
        """That something is the same in every process, to the last bit.

        Raises:
            DeltaloomError: it is not; says which processes differ from the first.
        """
        if self.size == 1:
            return
        found = self.texts(_digest(state))
        odd = [str(number) for number, text in enumerate(found) if text != found[0]]
        if odd:
            raise self.known_to_all(DeltaloomError(
                f"the processes of this run do not have the same {what}", got=f"process {', '.join(odd)} differs from process 0",
                hint="They need the same files, versions of libraries and kind of machine."))

    def known_to_all(self, error: DeltaloomError) -> DeltaloomError:
        """The error, which every process raises at the same place: the first one will speak for all."""
        error.known_to_all = self.size > 1
        return error


class Single(Team):
    """One process on its own: nothing is sent, no process group is made."""

    number, size = 0, 1

    @property
    def device(self) -> torch.device:
        """The accelerator if there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def together(self, work: Callable[[], T]) -> T:
        """Just do it."""
        return work()

    def once(self, work: Callable[[], T]) -> T:
        """Just do it."""
        return work()

    def add(self, work: Callable[[], Passed], parameters: Sequence[nn.Parameter]) -> Passed:
        """Just do it."""
        return work()

    def agree(self, stop: str | None, seconds: float) -> tuple[str | None, float]:
        """Its own."""
        return stop, seconds

    def texts(self, own: str) -> list[str]:
        """Its own."""
        return [own]

    def share(self, dealt: Callable[[int, int], Sequence[Sequence[int]]]) -> tuple[Sequence[Sequence[int]], int]:
        """All of them."""
        return dealt(0, 1), 0

    def spread(self, items: Sequence[T], work: Callable[[T], R]) -> list[R]:
        """Each in turn."""
        return [work(item) for item in items]


SINGLE = Single()


def check_team(tuned: Tuned, team: Team) -> None:
    """That nothing in the deltas is made of a process's own rows, where there are several.

    Raises:
        RefusedError: the deltas read their rows' texts while training.
    """
    if team.size > 1 and tuned.readers():
        raise RefusedError("these deltas learn what texts look like from the rows that a process sees, which differ between "
                           "processes", got=f"{team.size} processes", legal="one process",
                           hint="Train without torchrun, or take a method that does not choose by the input text.")


def step_seed(seed: int, step: int, number: int) -> int:
    """The seed of one process's dropout in one step of a run with several: a resumed run draws the same, with no state kept."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {number}".encode()).digest()[:7], "big")


def _digest(state: Mapping[str, Tensor] | str) -> str:
    digest = hashlib.sha256()
    if isinstance(state, str):
        digest.update(state.encode())
    else:
        for name, tensor in state.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


