"""How a run trains and asks its model: in this process, or as a front whose back is elsewhere. The rest of a run is the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from deltaloom.data.rows import Row
from deltaloom.deltas.base import StepPlan
from deltaloom.errors import SettingsError, did_you_mean
from deltaloom.evaluate.base import Task
from deltaloom.events import Emitter
from deltaloom.generate import generate
from deltaloom.jobs.budget import memory_left
from deltaloom.jobs.prepare import Prepared
from deltaloom.jobs.scoring import SAMPLE_TOKENS, Scores, answers, score, shown_rows
from deltaloom.train.checkpoints import Checkpoint, latest_checkpoint
from deltaloom.train.feed import ExampleFeed
from deltaloom.train.forecast import Trial, check_memory
from deltaloom.train.loop import Start
from deltaloom.train.progress import Goal
from deltaloom.train.resume import check_same
from deltaloom.train.run import TrainResult
from deltaloom.train.strategy import Strategy, check_room
from deltaloom.train.team import SINGLE, Team, check_team
from deltaloom.tuned import Tuned

LOWER_IS_BETTER = ("loss", "perplexity", "rmse", "mae")
Write = Callable[[nn.Module, Sequence[Any]], list[str]]
"""(model, prompts) -> the text that it writes after each."""


@dataclass(frozen=True)
class Before:
    """What the model does without the delta: to compare with."""

    scores: Scores
    answers: list[str]


@dataclass(frozen=True)
class Loop:
    """What `train.loop.train` is told of a run, whoever calls it."""

    emit: Emitter
    folder: Path
    identity: dict[str, str]
    floor_rate: float

    @property
    def log(self) -> Path:
        """The run's event file."""
        return self.folder / "events.jsonl"


class Engine(ABC):
    """A run's model, with its deltas. `model` is what is called for scores; `before` was measured without the deltas.

    `team` are the processes of the run, all of which call an engine alike.
    """

    def __init__(self, prepared: Prepared, tuned: Tuned, model: nn.Module, before: Before, team: Team = SINGLE) -> None:
        self.prepared, self.tuned, self.model, self.before, self.team = prepared, tuned, model, before, team

    @abstractmethod
    def resume(self, folder: Path, identity: dict[str, str], emit: Emitter) -> bool:
        """Whether there is something in the run folder to go on from; its event file then ends where it goes on.

        Raises:
            CheckpointError: it is of another run.
        """

    def check(self, plan: StepPlan) -> None:
        """That a run of that many steps can be, before anything of an earlier one is removed.

        Raises:
            SettingsError: it is too short for a controller.
        """
        self.tuned.controllers(plan)

    def check_memory(self) -> None:  # noqa: B027 (a back elsewhere looks after its own)
        """That the memory for a step is there, before anything of an earlier run is removed.

        Raises:
            ResourceError: it is not; says what to change.
        """

    @abstractmethod
    def train(self, loop: Loop) -> TrainResult:
        """Train the deltas."""

    @property
    def write(self) -> Write | None:
        """What writes texts after prompts; None where nothing does."""
        return written(self.prepared.task)

    @property
    def rows(self) -> tuple[Row, ...]:
        """The held-out rows."""
        return held_rows(self.prepared)

    def scores(self) -> Scores:
        """Of the tuned model, on the held-out rows."""
        return score(self.prepared.task, self.model, self.prepared.held, self.rows, self.team.spread)

    def shown(self) -> list[str]:
        """What the tuned model answers to the rows that the report shows."""
        return _shown(self.prepared, self.model, self.write)

    def told(self, emit: Emitter) -> dict[str, Any]:
        """Further facts for metrics.json when all scores are there, as events too."""
        return {}

    def close(self) -> None:  # noqa: B027 (nothing to give back is the rule)
        """Give back what the engine holds."""


class Here(Engine):
    """A whole model, in this process or in each of a team."""

    checkpoint: Checkpoint | None = None

    def check(self, plan: StepPlan) -> None:
        """Also that what its strategy asks for can be."""
        check_team(self.tuned, self.team)
        strategy = self._strategy()
        controllers = self.tuned.controllers(replace(plan, on_demand=strategy is not None and strategy.grows))
        if strategy is not None:
            check_room(strategy, controllers, self.tuned.counts()[0])

    def check_memory(self) -> None:
        """Of its largest micro-batch; a base that is spread over processes is not tried beforehand."""
        prepared = self.prepared
        if not prepared.parts.train.shard:
            left = memory_left(prepared.parts.budget, self.tuned.device, prepared.model_bytes)
            check_memory(trial_of(prepared, self.tuned), left)

    def _strategy(self) -> Strategy | None:
        plan = self.prepared.parts.strategy
        return None if plan is None else Strategy(plan, Goal(*goal_of(self.prepared)), self.prepared.waiting)

    def resume(self, folder: Path, identity: dict[str, str], emit: Emitter) -> bool:
        """From the newest whole checkpoint, which the first process reads."""
        def look() -> bool:
            self.checkpoint = resumable(folder, self.prepared, identity, emit)
            return self.checkpoint is not None

        return self.team.once(look)

    def train(self, loop: Loop) -> TrainResult:
        """One run of the loop."""
        return self.start(loop).alone()

    def start(self, loop: Loop) -> Start:
        """The run before it begins, for whoever trains it."""
        prepared = self.prepared
        return Start(self.tuned, prepared.task, feed_of(prepared), prepared.parts.train, loop.emit, prepared.run.file.seed,
                     (lambda tuned: self.scores().metrics) if prepared.held else None, Goal(*goal_of(prepared)),
                     loop.folder / "checkpoints", loop.log, self.checkpoint, loop.identity, floor_rate=loop.floor_rate,
                     strategy=self._strategy(), team=self.team)


def resumable(folder: Path, prepared: Prepared, identity: dict[str, str], emit: Emitter) -> Checkpoint | None:
    """The newest whole checkpoint of a run folder, whose event file then ends where it goes on; None if there is none.

    Raises:
        CheckpointError: it is of another run; nothing is changed.
    """
    checkpoint = latest_checkpoint(folder / "checkpoints", emit)
    if checkpoint is not None:
        check_same(checkpoint, prepared.parts.train, identity)
        checkpoint.rewind(folder / "events.jsonl")
    return checkpoint


def written(task: Task) -> Write:
    """Texts of a whole model."""
    return lambda model, prompts: generate(model, task.tokenizer, prompts, max_new_tokens=SAMPLE_TOKENS)  # type: ignore[arg-type]


def measured(prepared: Prepared, model: nn.Module, write: Write | None, team: Team = SINGLE) -> Before:
    """What a model without deltas does on the held-out rows.

    Raises:
        SettingsError: the run is judged by a metric that its task does not have.
    """
    found = score(prepared.task, model, prepared.held, held_rows(prepared), team.spread)
    goal = goal_of(prepared)[0]
    if prepared.held and goal not in found.metrics:
        plan = prepared.parts.strategy
        key = "train.metric" if plan is None or plan.metric is None else "strategy.target_metric"
        raise SettingsError(f"{key} names no metric of this task", got=goal, legal=found.metrics,
                            hint=did_you_mean(goal, found.metrics))
    return Before(found, _shown(prepared, model, write))


def _shown(prepared: Prepared, model: nn.Module, write: Write | None) -> list[str]:
    chosen = shown_rows(prepared.task, held_rows(prepared))
    return answers(prepared.task, model, held_rows(prepared)[:len(chosen)], prepared.held[:len(chosen)], write)


def held_rows(prepared: Prepared) -> tuple[Row, ...]:
    """The rows that nothing is trained on."""
    return tuple(prepared.rows.eval.rows) if prepared.rows.eval is not None else ()


def feed_of(prepared: Prepared, turn: int = 0) -> ExampleFeed:
    """The training rows as steps; each turn has an order of its own."""
    rows = prepared.rows.train.rows
    task, settings = prepared.task, prepared.parts.train
    return ExampleFeed(prepared.examples, task.pack if settings.packing else task.collate, settings,
                       seed=prepared.run.file.seed + turn, place=lambda index: rows[index].where)


def trial_of(prepared: Prepared, tuned: Tuned) -> Trial:
    """What a run's memory and time are found with."""
    return Trial(tuned, prepared.task, feed_of(prepared), prepared.parts.train, [example.length for example in prepared.examples])


def goal_of(prepared: Prepared) -> tuple[str, bool]:
    """(the metric by which the run is judged, whether higher is better)."""
    task = prepared.task
    metric = prepared.parts.train.metric or task.primary
    return metric, task.higher_is_better if metric == task.primary else metric not in LOWER_IS_BETTER
