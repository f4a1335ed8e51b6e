"""What must hold while training: finite numbers, gradients everywhere, deltas that run and change."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltaloom.errors import DeltaloomError, NonFiniteError, RefusedError, ResourceError, listed
from deltaloom.events import Emitter, Step, Warned
from deltaloom.train.team import SINGLE, Passed, Team
from deltaloom.tuned import Tuned

CPU_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")  # PyTorch has no class of its own for it on a CPU


@dataclass(frozen=True)
class Reading:
    """One optimizer step as it was computed; tensors are not read yet, because reading makes an accelerator wait."""

    step: int
    epoch: float
    learning_rate: float
    passed: Passed
    penalty: Tensor
    norm: Tensor


class Meter:
    """Collects readings, turns them into numbers now and then, all at once, and stops at the first that is not finite."""

    def __init__(self, emit: Emitter, every: int, place: Callable[[int], str], floor_rate: float | None,
                 team: Team = SINGLE) -> None:
        self.team = team
        self.emit = emit
        self.every = every
        self.place = place
        self.floor_rate = floor_rate
        self.last_good: str | None = None
        self.waiting: list[Reading] = []
        self.checked: list[tuple[Reading, list[float]]] = []
        self.seconds = 0.0

    def note(self, reading: Reading) -> None:
        """Add a step's reading; reads all that wait if it is time.

        Raises:
            NonFiniteError: a loss, penalty or gradient norm is not finite.
        """
        self.waiting.append(reading)
        if len(self.waiting) >= self.every:
            self.check()

    def check(self) -> None:
        """Read what waits."""
        if not self.waiting:
            return
        rows = [torch.stack([r.passed.loss(), _scalar(r.passed.count, r.norm), r.penalty.float(), r.norm.float()])
                for r in self.waiting]
        for reading, numbers in zip(self.waiting, torch.stack([row.detach() for row in rows]).tolist(), strict=True):
            if not all(math.isfinite(number) for number in numbers) or numbers[1] == 0:
                raise self._not_finite(reading, *numbers)
            self.checked.append((reading, numbers))
        self.waiting = []

    def report(self, seconds: float, memory_bytes: int) -> None:
        """A step took so many seconds; events for all steps that were read."""
        self.seconds += seconds
        if self.waiting or not self.checked:
            return
        each = self.seconds / len(self.checked)
        for reading, (loss, count, penalty, norm) in self.checked:
            tokens, padded = reading.passed.tokens, reading.passed.padded_tokens
            share = tokens / each / self.floor_rate if self.floor_rate and each else None
            self.emit(Step(step=reading.step, epoch=reading.epoch, loss=loss / count, penalty=penalty, gradient_norm=norm,
                           learning_rate=reading.learning_rate, tokens=tokens, seconds=each, floor_share=share,
                           padding=1 - tokens / max(1, padded), memory_bytes=memory_bytes))
        self.checked, self.seconds = [], 0.0

    def drop(self) -> None:
        """Forget the readings that wait: their steps are undone."""
        self.waiting, self.checked, self.seconds = [], [], 0.0

    def flush(self, memory_bytes: int) -> None:
        """Read and report everything, before an evaluation or a checkpoint."""
        self.check()
        self.report(0.0, memory_bytes)

    def _not_finite(self, reading: Reading, loss: float, count: float, penalty: float, norm: float) -> DeltaloomError:
        passed = reading.passed
        bad = [rows for rows, value in zip(passed.rows, passed.losses, strict=True) if not bool(torch.isfinite(value))]
        own = [[self.place(row) for part in parts for row in part] for parts in (bad, passed.rows)]
        bad_ones, all_of_them = ([place for part in parts for place in part] for parts in
                                 zip(*(json.loads(text) for text in self.team.texts(json.dumps(own))), strict=True))
        values = f"loss {loss / count if count else math.nan:g}, penalty {penalty:g}, gradient norm {norm:g}"
        what = (f"step {reading.step} has no target to learn from" if count == 0
                else f"training became non-finite at step {reading.step}")
        hint = (f"The last good checkpoint is {self.last_good}." if self.last_good else "There is no earlier checkpoint.")
        return self.team.known_to_all(NonFiniteError(
            what, got=values, problems=[f"rows of the batch: {listed(bad_ones or all_of_them, 32)}"],
            hint=f"{hint} Look at these rows, lower train.learning_rate, or set train.precision to fp32."))


class FirstSteps:
    """Watches the first two steps of a process: every delta runs, gets a gradient and changes."""

    def __init__(self, tuned: Tuned, parameters: Mapping[str, nn.Parameter], emit: Emitter) -> None:
        self.tuned = tuned
        self.parameters = parameters
        self.emit = emit
        self.steps = 0
        if not parameters:
            raise RefusedError("there is no trainable parameter",
                               hint="Attach a method with trainable deltas, and do not freeze them.")
        self.norms = self._norms()
        self.without_gradient: set[str] = set()

    def after_backward(self) -> None:
        """Look once at gradients and at what ran.

        Raises:
            DeltaloomError: nothing has a gradient: training could not change anything.
        """
        if self.steps:
            return
        idle = self.tuned.never_ran()
        if idle:
            message = f"layers that were not called, so that their deltas have no effect: {listed(idle)}"
            self.emit(Warned(kind="never-ran", message=message, count=len(idle)))
        missing = [name for name, parameter in self.parameters.items() if parameter.grad is None and parameter.numel()]
        self.without_gradient.update(missing)
        if all(parameter.grad is None for parameter in self.parameters.values()):
            raise DeltaloomError("no trainable parameter got a gradient in the first step", got=listed(missing, 6),
                                 hint="The loss does not depend on the deltas: look at the targets of the methods.")
        if missing:
            self.emit(Warned(kind="no-gradient", message=f"parameters without a gradient: {listed(missing)}", count=len(missing)))

    def after_step(self) -> None:
        """Look after the second step what changed; parameters that did not are a warning.

        Raises:
            DeltaloomError: all trainable parameters are as they were.
        """
        self.steps += 1
        if self.steps != 2:
            return
        same = (self._norms() == self.norms).tolist()
        if all(same):
            raise DeltaloomError("two optimizer steps changed no trainable parameter",
                                 hint="Every gradient is zero, or train.learning_rate is too small for float32.")
        idle = [name for (name, parameter), equal in zip(self.parameters.items(), same, strict=True)
                if equal and parameter.numel() and name not in self.without_gradient]
        self.parameters = {}  # what a controller replaces later is not to be kept in memory
        if idle:
            message = f"parameters that two steps did not change, although they have gradients: {listed(idle)}"
            self.emit(Warned(kind="unchanged", message=message, count=len(idle)))

    def _norms(self) -> Tensor:
        """A float64 number a parameter; equal numbers before and after mean equal tensors, but for a great chance."""
        return torch.stack(torch._foreach_norm([p.detach() for p in self.parameters.values()], 2, torch.float64))


@contextmanager
def memory_errors(rows: Sequence[Sequence[int]]) -> Iterator[None]:
    """Turn running out of memory in a step into an error that says what to lower."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory(rows, error) from error
    except RuntimeError as error:
        if not any(mark in str(error) for mark in CPU_OUT_OF_MEMORY):
            raise
        raise _out_of_memory(rows, error) from error


def _out_of_memory(rows: Sequence[Sequence[int]], error: BaseException) -> ResourceError:
    return ResourceError("out of memory in a training step", got=f"a micro-batch of up to {max(map(len, rows))} rows",
                         hint="Set train.gradient_checkpointing to true, lower data.max_length, or take a smaller model.",
                         problems=[str(error).strip().split("\n")[0]] if str(error) else ())


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=like.device)
