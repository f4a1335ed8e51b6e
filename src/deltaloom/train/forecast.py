"""What a run will take, found with a few of its own micro-batches: memory before the largest is tried, then seconds.

`saved_bytes` counts what one row of a width keeps for the backward pass; all rows of a padded micro-batch keep as much. So the
need of the largest micro-batch is known after a forward pass of one row, and `check_memory` refuses what cannot fit before the
first step. `forecast` then runs micro-batches of several sizes, the largest among them, and fits seconds to padded tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from deltaloom.data.batches import Batch
from deltaloom.errors import ResourceError
from deltaloom.train.feed import Feed
from deltaloom.train.memory import PeakMemory, free_bytes
from deltaloom.train.modes import faster_dropout, gradient_checkpointing, leaving_no_trace, training_mode
from deltaloom.train.optimizer import make_optimizer, set_learning_rate
from deltaloom.train.run import Learner
from deltaloom.train.settings import TrainSettings
from deltaloom.tuned import Tuned

SAMPLES = 6          # micro-batches that are timed, after one that warms up
WIDEST = 1024        # a row to count with has at most as many tokens; longer ones are counted in proportion
FP32 = 4


@dataclass(frozen=True)
class Forecast:
    """`peak_bytes` beyond the loaded model, `seconds` of the loop without evaluation and saving."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Trial:
    """What is tried: the parts of a run that its cost depends on. `lengths` are the training rows' tokens."""

    tuned: Tuned
    task: Learner
    feed: Feed
    settings: TrainSettings
    lengths: Sequence[int]

    @cached_property
    def order(self) -> list[Sequence[int]]:
        """The micro-batches of the first epoch, the smallest first."""
        return sorted((indices for micro in self.feed.steps(0) for indices in micro), key=self.padded)

    @cached_property
    def need(self) -> int:
        """Bytes that the largest micro-batch and the optimizer take at least, beyond the loaded model with its deltas."""
        largest = self.order[-1]
        fitting = min(WIDEST, max(self.lengths[index] for index in largest))
        row = min(range(len(self.lengths)), key=lambda index: abs(self.lengths[index] - fitting))
        with _as_in_training(self):
            kept = saved_bytes(self.tuned, self.task, self.batch([row]))
        numbers = sum(parameter.numel() for parameter in self.tuned.delta_parameters().values())
        states = 2 if self.settings.optimizer == "adamw" else int(self.settings.momentum > 0)
        return kept * self.padded(largest) // self.lengths[row] + FP32 * (1 + states) * numbers

    def padded(self, indices: Sequence[int]) -> int:
        """Tokens of a micro-batch with padding; packed rows have none."""
        lengths = [self.lengths[index] for index in indices]
        return sum(lengths) if self.settings.packing else len(lengths) * max(lengths)

    def batch(self, indices: Sequence[int]) -> Batch:
        """On the model's device."""
        return self.feed.batch(indices, self.tuned.device)


def check_memory(trial: Trial, free: int | None = None) -> None:
    """That the run fits into the memory that is free (`free`: as if it were that much).

    Raises:
        ResourceError: it does not; says what to change.
    """
    free = free_bytes(trial.tuned.device) if free is None else free
    if free is None:
        return
    need = trial.need
    if need <= free:
        return
    largest = trial.order[-1]
    width = max(trial.lengths[index] for index in largest)
    options = [] if trial.settings.gradient_checkpointing else ["train.gradient_checkpointing: true"]
    options += [f"a smaller data.max_length (the longest row has {max(trial.lengths):,} tokens)", "base.quantise: int8 or nf4"]
    raise ResourceError(f"training needs at least {need / 2**20:,.0f} MiB besides the model for its largest micro-batch, "
                        f"{len(largest)} rows of {width:,} tokens", got=f"{free / 2**20:,.0f} MiB free",
                        hint=f"What takes less: {', '.join(options)}.")


def forecast(trial: Trial, steps: int) -> Forecast:
    """Peak memory and time of a run of that many steps, from a few of its micro-batches; no value changes.

    Seconds of a micro-batch are a + b * padded tokens, by least squares; a run is as many of them as its first epoch says.
    """
    order, least = trial.order, trial.need
    chosen = [order[round(share * (len(order) - 1))] for share in np.linspace(0, 1, SAMPLES)]
    memory = PeakMemory(trial.tuned.device)
    with _as_in_training(trial):
        parameters = trial.tuned.delta_parameters()
        optimizer = make_optimizer(parameters, trial.settings)
        set_learning_rate(optimizer, 0.0)
        _passes(trial, chosen[-1])
        began = time.perf_counter()
        optimizer.step()
        each_step = time.perf_counter() - began
        peak = max(least, memory.peak() or 0)  # what is counted is taken, also where the peak cannot be measured
        taken = [_passes(trial, indices) for indices in chosen]
    fixed, rate = _line([trial.padded(indices) for indices in chosen], taken)
    epoch = sum(fixed + rate * trial.padded(indices) for indices in order)
    return Forecast(steps * (epoch / len(trial.feed.steps(0)) + each_step), peak)


def saved_bytes(tuned: Tuned, task: Learner, batch: Batch) -> int:
    """Bytes that a forward pass keeps for its backward pass: every storage once, those of parameters and buffers not."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*tuned.parameters(), *tuned.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # with its history, a node would keep itself alive through an output that it saves

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total, _ = task.loss(tuned, batch)
    found = sum(kept.values())
    del total  # until here, no storage was given to another tensor
    return found


def _as_in_training(trial: Trial) -> ExitStack:
    stack = ExitStack()
    for mode in (leaving_no_trace(trial.tuned), training_mode(trial.tuned, True), faster_dropout(trial.tuned),
                 gradient_checkpointing(trial.tuned, trial.settings.gradient_checkpointing)):
        stack.enter_context(mode)
    return stack


def _passes(trial: Trial, indices: Sequence[int]) -> float:
    """Seconds of one micro-batch: made, forward and backward."""
    began = time.perf_counter()
    total, _ = trial.task.loss(trial.tuned, trial.batch(indices))
    total.backward()
    float(total.detach())  # waits for an accelerator
    return time.perf_counter() - began


def _line(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """(a, b) of seconds = a + b * size, neither negative."""
    if len(set(sizes)) > 1:
        rate, fixed = np.polyfit(sizes, seconds, 1)
        if rate >= 0 and fixed >= 0:
            return float(fixed), float(rate)
    return 0.0, float(sum(seconds) / sum(sizes))
