"""The training loop, the only one.

    for each optimizer step:
        for each micro-batch:  task.loss(tuned, batch) -> (sum, count);  sum.backward()
        gradients / total count;  tuned.penalty().backward()
        controllers.after_backward();  clip;  optimizer.step();  controllers.after_step()
        evaluate and save when due; stop at the end, at the time limit, early, or when asked to

It knows no method, no model and no data format. What it needs to go on is in its `Progress` and in the states that a
checkpoint holds, so a run that was stopped anywhere and resumed gives bit for bit the tensors of an uninterrupted one.
`cohort` takes these steps for several runs at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaloom.compact.face import parameter_count
from deltaloom.deltas.base import StepPlan
from deltaloom.errors import DataError, RefusedError, SettingsError
from deltaloom.events import Acted, Emitter, Started
from deltaloom.train.budget import steps_that_fit
from deltaloom.train.checkpoints import Checkpoint, checkpoints, remove_leftovers
from deltaloom.train.feed import Feed
from deltaloom.train.guards import FirstSteps, Meter
from deltaloom.train.memory import PeakMemory
from deltaloom.train.modes import faster_dropout, gradient_checkpointing, training_mode
from deltaloom.train.optimizer import load_optimizer_state, make_optimizer, row_keeper
from deltaloom.train.progress import Goal, Progress, planned_steps
from deltaloom.train.resume import check_same, resumed_progress
from deltaloom.train.run import Evaluate, Learner, Run, TrainResult
from deltaloom.train.settings import TrainSettings
from deltaloom.train.signals import StopRequest, polite_stop
from deltaloom.train.state import seed_everything, set_random_states
from deltaloom.train.strategy import Strategy, check_room
from deltaloom.train.team import SINGLE, Team, check_team
from deltaloom.train.warmup import warm_up
from deltaloom.tuned import Tuned

LOSS = Goal("loss", higher=False)


def train(tuned: Tuned, task: Learner, feed: Feed, *, settings: TrainSettings, emit: Emitter | None = None, seed: int = 0,
          evaluate: Evaluate | None = None, goal: Goal = LOSS, folder: Path | None = None, log: Path | None = None,
          resume: Checkpoint | None = None, identity: Mapping[str, str] | None = None,
          floor_rate: float | None = None, ahead: int = 1, before_step: Callable[[int], None] | None = None,
          strategy: Strategy | None = None, team: Team = SINGLE) -> TrainResult:
    """Train the deltas that `tuned` uses, on the rows of `feed`, and give back what was done.

    `evaluate` gives the metrics of the tuned model (called in evaluation mode, without gradients), `goal` says which of them
    decides. `folder` takes the checkpoints, `log` is the event file whose position they note. `resume` goes on from a
    checkpoint (`checkpoints.latest_checkpoint` finds it; call its `rewind(log)` before opening the log). `identity` names what
    a resumed run must share besides its settings, such as fingerprints of model and data. `floor_rate` is the tokens per
    second at the floor of operations. `ahead` forward passes of a step's micro-batches run before the first one's backward pass:
    more than one pays where a loss is computed elsewhere. `before_step` is called with each step's number. `strategy` may change
    the course after each evaluation; its goal is then the run's, and its methods that wait have to be attached. The process's
    random generators are seeded; dropout of the model is active.

    With a `team` of several processes each calls this with the same arguments; `folder`, `log`, `emit` and `resume` are the first
    one's alone. The figures are then those of one process with the same rows in a step, but for rounding and dropout's draws.

    Raises:
        NonFiniteError: loss or gradient is NaN or infinite; the parameters are not stepped, no checkpoint is overwritten.
        Interrupted: Ctrl-C or SIGTERM, after the step was finished and saved. A second signal raises KeyboardInterrupt.
        ResourceError: no memory or no disk space. CheckpointError: `resume` is of another run.
        ElsewhereError: another process failed, or is gone.
        SettingsError: early stopping or restoring the best without evaluation. RefusedError: `folder` holds another run.
    """
    return Start(tuned, task, feed, settings, emit or Emitter(), seed, evaluate, goal, folder, log, resume, dict(identity or {}),
                 floor_rate, ahead, before_step, strategy, team).alone()


@dataclass
class Start:
    """A run before it begins: the arguments of `train`, for whoever takes its steps."""

    tuned: Tuned
    task: Learner
    feed: Feed
    settings: TrainSettings
    emit: Emitter
    seed: int
    evaluate: Evaluate | None
    goal: Goal
    folder: Path | None
    log: Path | None
    resume: Checkpoint | None
    identity: dict[str, str]
    floor_rate: float | None = None
    ahead: int = 1
    before_step: Callable[[int], None] | None = None
    strategy: Strategy | None = None
    team: Team = SINGLE

    def alone(self) -> TrainResult:
        """The whole run, which has the model for itself; raises as `train`."""
        self.check()
        with ExitStack() as stack:
            stop = stack.enter_context(polite_stop())
            stack.enter_context(training_mode(self.tuned, True))
            stack.enter_context(faster_dropout(self.tuned))
            stack.enter_context(gradient_checkpointing(self.tuned, self.settings.gradient_checkpointing))
            run = self.run(PeakMemory(self.tuned.device))
            while (reason := between_steps(run, stop)) is None:
                run.step()
            return run.finish(reason)

    def check(self) -> None:
        """Look at everything that can be wrong, and take away what an earlier run has left unfinished; raises as `train`."""
        team = self.team
        self.emit = self.emit if team.first else Emitter()
        self.resume = _first_ones(self.resume, team)
        _check(self.tuned, self.settings, self.evaluate, self.feed, self.folder, self.resume, self.strategy, team)
        if self.strategy is not None:
            self.strategy.hold(self.tuned)
            self.goal = self.strategy.goal
            self.emit = Emitter([*self.emit.sinks, self.strategy.hear])
        if self.resume is not None:
            check_same(self.resume, self.settings, self.identity)
        if self.folder is not None:
            team.once(partial(remove_leftovers, self.folder, self.emit))
        team.check_same("run", json.dumps([self.settings.as_dict(), self.identity], sort_keys=True, default=str))

    def run(self, memory: PeakMemory) -> Run:
        """The run, up to its first step; the model is in training mode, and the process's random generators are this run's."""
        tuned, task, feed, settings = self.tuned, self.task, self.feed, self.settings
        seed_everything(self.seed)
        progress = (resumed_progress(self.resume, settings, self.emit) if self.resume is not None
                    else _planned(tuned, task, feed, settings, self.emit, self.team))
        run = self._assembled(progress, memory)
        if self.resume is not None:
            _take(run, self.resume)
        else:
            _warm_up(run)
        if self.team.size > 1:  # values that were computed, by a warm-up or a decomposition, may differ in the last bit
            tuned.load_delta_state(self.team.once(tuned.delta_state))
        trainable = sum(parameter.numel() for parameter in run.parameters.values())
        self.emit(Started(step=progress.step, total_steps=progress.total_steps, trainable_parameters=trainable,
                          total_parameters=parameter_count(tuned) - _of_others(tuned)))
        return run

    def _assembled(self, progress: Progress, memory: PeakMemory) -> Run:
        tuned, settings, emit, strategy = self.tuned, self.settings, self.emit, self.strategy
        parameters = tuned.delta_parameters()
        optimizer = make_optimizer(parameters, settings)
        every = settings.log_every or (1 if tuned.device.type == "cpu" else 10)
        run = Run(tuned=tuned, task=self.task, feed=self.feed, settings=settings, emit=emit, progress=progress,
                  optimizer=optimizer, controllers=[], meter=Meter(emit, every, self.feed.place, self.floor_rate, self.team),
                  first=FirstSteps(tuned, parameters, emit), memory=memory, evaluate=self.evaluate, goal=self.goal,
                  folder=self.folder, log=self.log, identity=self.identity, parameters=parameters, ahead=self.ahead,
                  before_step=self.before_step, strategy=strategy, team=self.team, seed=self.seed)
        on_demand = strategy is not None and strategy.grows
        keeper = None if on_demand else row_keeper(optimizer, run.look_again)  # what waits to be grown is not removed
        run.controllers = tuned.controllers(StepPlan(progress.total_steps, emit, keeper, on_demand))
        if strategy is not None:
            check_room(strategy, run.controllers, tuned.counts()[0])
        return run


def _of_others(tuned: Tuned) -> int:
    """Parameters of the lanes that are not this run's."""
    modules = [module for lane in tuned.lanes if lane != tuned.name for part in tuned.attached(lane)
               for _, module in part.named_deltas()]
    return sum({id(parameter): parameter.numel() for module in modules for parameter in module.parameters()}.values())


def between_steps(run: Run, stop: StopRequest) -> str | None:
    """Evaluate and save if it is due; gives back why to take no further step, or None."""
    if run.progress.due(run.settings.eval_every) and run.asked(stop) is None:
        run.evaluate_now()
    if run.progress.due(run.settings.save_every):
        run.save_now()
    return run.reason_to_stop(run.asked(stop))


def check_no_evaluation(settings: TrainSettings) -> None:
    """That the settings of a run without evaluation rows ask for none.

    Raises:
        SettingsError: they do; names the keys.
    """
    wants = [key for key in ("early_stop", "restore_best", "metric", "eval_every") if getattr(settings, key)]
    if wants:
        raise SettingsError("there is nothing to evaluate on", got=", ".join(f"train.{key}" for key in wants),
                            hint="Give data.eval or data.eval_fraction, or remove these keys.")


def _check(tuned: Tuned, settings: TrainSettings, evaluate: Evaluate | None, feed: Feed, folder: Path | None,
           resume: Checkpoint | None, strategy: Strategy | None, team: Team) -> None:
    check_team(tuned, team)
    if evaluate is None:
        check_no_evaluation(settings)
        if strategy is not None:
            raise SettingsError("a strategy watches evaluations, and there is nothing to evaluate on",
                                hint="Give data.eval or data.eval_fraction, or leave out the section strategy.")
    if not feed.steps(0):
        raise DataError("there are no training rows")
    if folder is not None and resume is None and team.once(lambda: bool(checkpoints(folder))):
        raise RefusedError("the folder holds checkpoints of an earlier run", got=str(folder), hint="Use --resume or --overwrite.")


def _first_ones(resume: Checkpoint | None, team: Team) -> Checkpoint | None:
    """The checkpoint of the first process: the others may not see its folder."""
    if team.size == 1:
        return resume
    told: list[Any] = team.once(lambda: [] if resume is None else [str(resume.path), resume.step, resume.parts])
    return Checkpoint(Path(told[0]), told[1], told[2]) if told else None


def _planned(tuned: Tuned, task: Learner, feed: Feed, settings: TrainSettings, emit: Emitter, team: Team) -> Progress:
    """A new run's progress; where only its time is limited, a few steps are tried to see how many fit."""
    total = planned_steps(settings, feed)
    if total is not None:
        return Progress(total)
    limit = settings.time_limit or 0.0
    total, spent, each = steps_that_fit(tuned, task, feed, limit, team)
    emit(Acted(step=0, action="planned", reason=f"max_time {settings.max_time}: {total} steps of about {each:.3g} s"))
    return Progress(total, seconds=spent)


def _warm_up(run: Run) -> None:
    """Initial values from gradients, where a method wants them: of the first batches of the first epoch."""
    tuned, feed = run.tuned, run.feed

    def loss(indices: Sequence[int]) -> Tensor:
        total, count = run.task.loss(tuned, feed.batch(indices, tuned.device))
        return total / count

    warm_up(tuned, (indices for micro in feed.steps(0) for indices in micro), loss, run.emit)


def _take(run: Run, resume: Checkpoint) -> None:
    if run.strategy is not None:
        run.take_strategy(resume.parts["strategy"])
    run.take_delta(resume.parts)
    load_optimizer_state(run.optimizer, run.parameters, resume.parts["optimizer"])
    set_random_states(resume.parts["random"])
    run.first = FirstSteps(run.tuned, run.parameters, run.emit)
    run.saved_step, run.meter.last_good = resume.step, str(resume.path)
    run.emit(Acted(step=resume.step, action="resumed", reason=f"from checkpoint {resume.path.name}"))
