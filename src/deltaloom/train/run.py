"""One training run: its parts, one optimizer step, and what happens between steps; `loop.train` puts it together."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deltaloom.data.batches import Batch
from deltaloom.deltas.base import Controller
from deltaloom.errors import Interrupted, NonFiniteError
from deltaloom.events import Acted, Emitter, Evaluated, Finished, Saved, Warned
from deltaloom.files import sync
from deltaloom.train.checkpoints import prune_checkpoints, read_checkpoint, write_checkpoint
from deltaloom.train.feed import Feed
from deltaloom.train.guards import FirstSteps, Meter, Reading, memory_errors
from deltaloom.train.memory import PeakMemory, resident_bytes
from deltaloom.train.modes import training_mode
from deltaloom.train.optimizer import (
    add_parameters,
    clip_gradients,
    divide_gradients,
    gradient_norm,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from deltaloom.train.progress import Goal, Progress
from deltaloom.train.schedule import factor
from deltaloom.train.settings import TrainSettings
from deltaloom.train.signals import StopRequest
from deltaloom.train.state import keep_random_states, random_states, seed_everything
from deltaloom.train.strategy import Strategy
from deltaloom.train.team import SINGLE, Passed, Team, step_seed
from deltaloom.tuned import Tuned

Evaluate = Callable[[Tuned], Mapping[str, float]]


class Learner(Protocol):
    """What the loop needs of a task."""

    def loss(self, tuned: Tuned, batch: Batch) -> tuple[Tensor, Tensor | float]:
        """(sum of the losses, what to divide it by): tokens or rows with a target, or the sum of their weights."""


@dataclass(frozen=True)
class TrainResult:
    """What a run did. `seconds` is the loop alone; evaluation and saving are given apart."""

    step: int
    total_steps: int
    epochs: float
    reason: str
    seconds: float
    evaluation_seconds: float
    saving_seconds: float
    tokens: int
    metrics: dict[str, float]       # of the last evaluation; of the best one if restore_best
    best_step: int | None
    peak_memory_bytes: int | None   # beyond the loaded model; None where it cannot be measured


def _backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


@dataclass
class Run:
    """The parts of one training run, put together by `train`."""

    tuned: Tuned
    task: Learner
    feed: Feed
    settings: TrainSettings
    emit: Emitter
    progress: Progress
    optimizer: Optimizer
    controllers: list[Controller]
    meter: Meter
    first: FirstSteps
    memory: PeakMemory
    evaluate: Evaluate | None
    goal: Goal
    folder: Path | None
    log: Path | None
    identity: dict[str, str]
    parameters: dict[str, nn.Parameter]
    ahead: int = 1
    before_step: Callable[[int], None] | None = None
    strategy: Strategy | None = None
    team: Team = SINGLE
    seed: int = 0
    ending: bool = False
    saved_step: int = -1
    evaluation_seconds: float = 0.0
    saving_seconds: float = 0.0
    best: dict[str, Any] | None = None
    _epoch: tuple[int, Sequence[Sequence[Sequence[int]]]] = field(default=(-1, ()))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.tuned.device

    def look_again(self) -> None:
        """Take in that parameters were replaced: a controller removed what it had masked."""
        self.parameters = {}

    # ---- one optimizer step ---------------------------------------------------------------------------------------

    def step(self) -> None:
        """One optimizer step, timed from the choice of its rows on."""
        began = time.perf_counter()
        micro = self.begin_step()
        self.take_step(micro, time.perf_counter() - began)

    def begin_step(self) -> Sequence[Sequence[int]]:
        """The micro-batches of the next step, which then begins."""
        micro = self._next_rows()
        if self.before_step is not None:
            self.before_step(self.progress.step + 1)
        return micro

    def take_step(self, micro: Sequence[Sequence[int]], spent: float = 0.0) -> None:
        """The step that has begun, which took `spent` seconds so far."""
        began = time.perf_counter()
        with memory_errors(micro):
            passed = self._passed(micro)
        self.end_step(passed, spent + time.perf_counter() - began)

    def end_step(self, passed: Passed, spent: float) -> None:
        """The rest of a step whose losses' gradients are in the parameters, which took `spent` seconds.

        Raises:
            NonFiniteError: and the strategy, if there is one, has no answer to it.
        """
        began = time.perf_counter()
        try:
            with memory_errors(passed.rows):
                self._update(passed)
        except NonFiniteError as error:
            if not self._recovered(error):
                raise
        elapsed = spent + time.perf_counter() - began
        self.progress.seconds += elapsed
        self.meter.report(elapsed, resident_bytes(self.device))

    def _update(self, passed: Passed) -> None:
        progress, settings = self.progress, self.settings
        step = progress.step + 1
        parameters = list(self.parameters.values())
        divide_gradients(parameters, passed.count)
        penalty = self.tuned.penalty()
        if penalty.requires_grad:
            penalty.backward()
        self.first.after_backward()
        norm = gradient_norm(parameters)
        learning_rate = settings.learning_rate * factor(step, progress.total_steps, settings.schedule, settings.warmup)
        learning_rate *= self.strategy.rate if self.strategy is not None else 1.0
        epoch = progress.epoch + (progress.index + 1) / progress.steps_in_epoch
        self.meter.note(Reading(step, epoch, learning_rate, passed, penalty.detach(), norm))
        for controller in self.controllers:
            controller.after_backward(step)
        if settings.clip is not None:
            clip_gradients(parameters, settings.clip, norm)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.first.after_step()  # before controllers: what they set back to zero did change
        for controller in self.controllers:
            controller.after_step(step)
        if not self.parameters:
            self.parameters = self.tuned.delta_parameters()
        self.optimizer.zero_grad()
        progress.step, progress.index, progress.tokens = step, progress.index + 1, progress.tokens + passed.tokens

    def _passed(self, micro: Sequence[Sequence[int]]) -> Passed:
        """Gradients of the summed loss over all rows of the step, whichever process they fall to, and its figures."""
        if self.team.size > 1:
            seed_everything(step_seed(self.seed, self.progress.step + 1, self.team.number))
        own, idle = self.team.share(partial(self.feed.dealt, micro))
        parameters = list(self.parameters.values())

        def work() -> Passed:
            with memory_errors(own):
                return self._backward(own, idle)

        passed = self.team.add(work, parameters)
        if passed.noise is not None and self.strategy is not None:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            self.strategy.noise.after_step(passed.noise, gradients, passed.count)
        return passed

    def _backward(self, micro: Sequence[Sequence[int]], idle: int) -> Passed:
        """Gradients of the summed loss over these micro-batches, of which the last `idle` do not count."""
        losses: list[Tensor] = []
        batches: list[Batch] = []
        waiting: deque[Tensor] = deque()  # losses whose backward pass is still to come, oldest first
        count: Tensor | float = 0.0
        several = len(micro) > 1 or self.team.size > 1
        noise = self.strategy.noise if self.strategy is not None and self.ahead == 1 and several else None
        for place, indices in enumerate(micro):
            batch = self.feed.batch(indices, self.device)
            loss, part = self.task.loss(self.tuned, batch)
            if place >= len(micro) - idle:
                (loss * 0.0).backward()
                continue
            waiting.append(loss)
            batches.append(batch)
            count = count + part
            if len(waiting) == self.ahead:
                losses.append(_backward(waiting.popleft()))
            if noise is not None:
                noise.after_micro_batch(list(self.parameters.values()), part)
        losses.extend(_backward(loss) for loss in waiting)
        return Passed(losses, count, [batch.rows for batch in batches], sum(batch.tokens for batch in batches),
                      sum(batch.padded_tokens for batch in batches), None if noise is None else noise.parts())

    def _next_rows(self) -> Sequence[Sequence[int]]:
        progress = self.progress
        if progress.index == progress.steps_in_epoch and progress.step > 0:
            progress.epoch, progress.index = progress.epoch + 1, 0
        if self._epoch[0] != progress.epoch:
            self._epoch = progress.epoch, self.feed.steps(progress.epoch)
            progress.steps_in_epoch = len(self._epoch[1])
        return self._epoch[1][progress.index]

    # ---- between steps --------------------------------------------------------------------------------------------

    def evaluate_now(self) -> None:
        """Evaluate at the current step, in evaluation mode, without touching the random states of training."""
        if self.evaluate is None or self.progress.evaluated_step == self.progress.step:
            return
        self.meter.flush(resident_bytes(self.device))
        began = time.perf_counter()
        with keep_random_states(), torch.no_grad(), training_mode(self.tuned, False):
            metrics = self._evaluated(self.evaluate)
        self.evaluation_seconds += time.perf_counter() - began
        best = self.progress.note_metrics(metrics, self.goal, self.settings.early_stop)
        self.emit(Evaluated(step=self.progress.step, metrics=self.progress.metrics, best=best))
        if best and (self.settings.restore_best or self.strategy is not None) and self.folder is None:
            self.best = copy.deepcopy({**self._delta_parts(), "progress": {"metrics": self.progress.metrics},
                                       "optimizer": optimizer_state(self.optimizer, self.parameters)})
        if self.strategy is not None:  # before anything is saved: a checkpoint holds what came of it
            self.strategy.after_evaluation(self.progress.metrics, self, self.emit, self.progress.step,
                                           last=self.ending or self.progress.step >= self.progress.total_steps)
        if best:
            self.save_now()

    def _evaluated(self, evaluate: Evaluate) -> Mapping[str, float]:
        """The first process's metrics: each has its own if the evaluation is not shared out, and one decides for all."""
        own = self.team.together(lambda: {name: float(value) for name, value in evaluate(self.tuned).items()})
        return self.team.once(lambda: own)

    def save_now(self) -> None:
        """Write a checkpoint of the current step, unless there is one; the first process does."""
        progress = self.progress
        if self.folder is None or self.saved_step == progress.step or progress.step == 0:
            return
        self.meter.flush(resident_bytes(self.device))
        began = time.perf_counter()
        self.team.check_same("deltas", self.tuned.delta_state())  # they would drift apart for good
        path = Path(self.team.once(partial(self._write, self.folder)))
        self.saved_step = progress.step
        self.meter.last_good = str(path)
        self.saving_seconds += time.perf_counter() - began
        if self.team.first:
            size = sum(file.stat().st_size for file in path.iterdir())
            self.emit(Saved(step=progress.step, path=f"{self.folder.name}/{path.name}", bytes=size))

    def _write(self, folder: Path) -> str:
        progress = self.progress
        if self.log is not None and self.log.exists():
            sync(self.log)
            progress.log_bytes = self.log.stat().st_size
        path = write_checkpoint(folder, progress.step, self._parts())
        prune_checkpoints(folder, self.settings.keep_checkpoints, [progress.best_step])
        return str(path)

    def asked(self, stop: StopRequest) -> str | None:
        """The signal that a process of this run was asked to stop with; from here on all have the first one's time too."""
        asked, self.progress.seconds = self.team.agree(stop.name, self.progress.seconds)
        return asked

    def reason_to_stop(self, asked: str | None) -> str | None:
        """Why not to take another step, or None; `asked` is the signal that asks to stop."""
        progress, early, limit = self.progress, self.settings.early_stop, self.settings.time_limit
        if self.strategy is not None and self.strategy.reason is not None:
            return self.strategy.reason
        if progress.step >= progress.total_steps:
            return "completed"
        if early is not None and progress.stale >= early.patience:
            self.emit(Acted(step=progress.step, action="early_stop",
                            reason=f"{self.goal.metric} did not improve by more than {early.min_delta:g} in {progress.stale} "
                                   f"evaluations; the best is {progress.best_value:g} at step {progress.best_step}"))
            return "early_stop"
        if asked is not None:
            self.emit(Acted(step=progress.step, action="interrupted", reason=f"signal {asked}"))
            return "interrupted"
        return "max_time" if limit is not None and progress.seconds >= limit else None

    def _delta_parts(self) -> dict[str, Any]:
        return {"delta": self.tuned.delta_state(), "controllers": [controller.state_dict() for controller in self.controllers]}

    def _parts(self) -> dict[str, Any]:
        return {**self._delta_parts(), "optimizer": optimizer_state(self.optimizer, self.parameters),
                "random": random_states(), "progress": dataclasses.asdict(self.progress),
                "settings": self.settings.as_dict(), "identity": self.identity,
                **({} if self.strategy is None else {"strategy": self.strategy.state_dict()})}

    def take_delta(self, parts: Mapping[str, Any]) -> None:
        """Take the deltas and the controllers' states of a checkpoint."""
        self.tuned.load_delta_state(parts["delta"])
        for controller, state in zip(self.controllers, parts["controllers"], strict=True):
            controller.load_state_dict(state)

    # ---- what a strategy may do ---------------------------------------------------------------------------------------

    def lower(self, factor: float) -> str | None:
        """See `rules.base.Hand`."""
        strategy = self._strategy()
        strategy.rate *= factor
        return f"the learning rate is now {strategy.rate:.4g} of its schedule"

    def restore(self) -> str | None:
        """See `rules.base.Hand`."""
        parts = self._best_parts()
        if parts is None:
            return None
        self.take_delta(parts)
        self.optimizer.state.clear()
        load_optimizer_state(self.optimizer, self.parameters, parts["optimizer"])
        self.optimizer.zero_grad()
        return f"back to step {self.progress.best_step}"

    def grow(self, factor: float, most: int | None) -> str | None:
        """See `rules.base.Hand`."""
        acting = self.tuned.counts()[0] - sum(controller.reserve() for controller in self.controllers)
        grown = 0
        for controller in self.controllers:
            grown += controller.grow(factor, None if most is None else max(0, most - acting - grown))
        return f"{acting + grown} numbers act instead of {acting}" if grown else None

    def release(self) -> str | None:
        """See `rules.base.Hand`."""
        strategy = self._strategy()
        if strategy.released or not strategy.waiting:
            return None
        self._let_train(strategy)
        return f"{', '.join(method.name for method in strategy.waiting)} train too"

    def stop(self, word: str, restore: bool) -> str | None:
        """See `rules.base.Hand`."""
        strategy = self._strategy()
        strategy.reason, strategy.restores = word, restore
        return f"training ends at step {self.progress.step}"

    def take_strategy(self, state: Mapping[str, Any]) -> None:
        """Take a checkpoint's strategy, before its deltas and its optimizer."""
        strategy = self._strategy()
        strategy.load_state_dict(state)
        if strategy.released:
            self._let_train(strategy)

    def _let_train(self, strategy: Strategy) -> None:
        strategy.released = True
        strategy.hold(self.tuned)
        self.parameters = self.tuned.delta_parameters()
        add_parameters(self.optimizer, self.parameters, self.settings)

    def _recovered(self, error: NonFiniteError) -> bool:
        """Whether the strategy has an answer to a step that was not finite; the step is then taken anew."""
        if self.strategy is None:
            return False
        self.meter.drop()
        self.strategy.noise.drop()
        self.strategy.noise.forget()
        done = self.strategy.after_failure(str(error).split("\n")[0], self, self.emit, self.progress.step)
        self.optimizer.zero_grad()
        return done

    def _strategy(self) -> Strategy:
        if self.strategy is None:
            raise RuntimeError("this run has no strategy")
        return self.strategy

    # ---- the end --------------------------------------------------------------------------------------------------

    def finish(self, reason: str) -> TrainResult:
        """Last evaluation and checkpoint, the best delta if wanted, controllers' last work, and the result."""
        progress, self.ending = self.progress, True
        if reason != "interrupted":
            self.evaluate_now()
        self.save_now()
        self.meter.flush(resident_bytes(self.device))
        peak = self.memory.peak()
        self.emit(Finished(step=progress.step, reason=reason, seconds=progress.seconds, tokens=progress.tokens))
        if reason == "interrupted":
            where = (f"Everything is in {self.meter.last_good}: run again with --resume." if self.meter.last_good
                     else "No checkpoint was written.")
            raise self.team.known_to_all(Interrupted(f"interrupted at step {progress.step} of {progress.total_steps}",
                                                     hint=where))
        if self.settings.restore_best or (self.strategy is not None and self.strategy.restores):
            self._restore_best()
        for controller in self.controllers:
            controller.finish()
        if self.strategy is not None and not self.strategy.released:
            for part in self.strategy.held(self.tuned):
                self.tuned.discard(part)
        return TrainResult(step=progress.step, total_steps=progress.total_steps, epochs=progress.epochs, reason=reason,
                           seconds=progress.seconds, evaluation_seconds=self.evaluation_seconds, tokens=progress.tokens,
                           saving_seconds=self.saving_seconds, metrics=progress.metrics, best_step=progress.best_step,
                           peak_memory_bytes=peak)

    def _restore_best(self) -> None:
        progress, best = self.progress, self._best_parts()
        if best is not None:
            progress.metrics = best["progress"]["metrics"]
            self.take_delta(best)
            self.emit(Acted(step=progress.step, action="restore_best", reason=f"step {progress.best_step} was the best"))

    def _best_parts(self) -> dict[str, Any] | None:
        """The parts of the best evaluation; None where there was none, it is the current step, or its checkpoint is gone."""
        progress = self.progress
        if progress.best_step is None or progress.best_step == progress.step:
            return None
        if self.folder is None:
            return copy.deepcopy(self.best)  # what takes tensors from it may come again
        path = self.folder / f"step-{progress.best_step}"
        parts = self.team.once(lambda: read_checkpoint(path).parts if path.is_dir() else None)
        if parts is None:
            self.emit(Warned(kind="best-is-gone", message=f"the checkpoint of the best step {progress.best_step} is gone; "
                                                          "the delta of the last step is kept"))
        return parts
