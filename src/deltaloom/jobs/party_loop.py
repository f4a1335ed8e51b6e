"""The training of a party over the cut: by the one loop, alone or in joint rounds.

In rounds each one is a run of the loop from the common values; the first round joins what the parties tuned on their emulators.
What was begun is noted before it begins, so that a killed party goes on in the same round, from its checkpoint.
"""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaloom.errors import SettingsError
from deltaloom.events import Acted, Emitter, Evaluated, Event, Started
from deltaloom.jobs.engine import Loop, feed_of, goal_of, resumable
from deltaloom.jobs.party import PartyState
from deltaloom.jobs.prepare import Prepared
from deltaloom.private.client import GrpcChannel
from deltaloom.private.front import FrontModel, Learner
from deltaloom.private.guards.base import UpdateGuard
from deltaloom.private.joining import Participant, Trained
from deltaloom.private.round_messages import Asked, RoundReply, RoundRequest, StandReply
from deltaloom.train.checkpoints import Checkpoint, latest_checkpoint
from deltaloom.train.feed import Feed
from deltaloom.train.loop import train
from deltaloom.train.progress import Goal, planned_steps
from deltaloom.train.resume import check_same
from deltaloom.train.run import Evaluate, TrainResult

ROUNDS = "rounds"
PAUSE = 0.25  # seconds between two questions whether the others are ready


class Training(ABC):
    """How the deltas of a front are trained. `rounds` done and `samples` used are facts for the report."""

    def __init__(self, prepared: Prepared, model: FrontModel, window: int) -> None:
        self.prepared, self.model = prepared, model
        self.ahead = min(window, model.remote.channel.window)
        self.rounds, self.samples = 0, 0
        self.checkpoint: Checkpoint | None = None

    @abstractmethod
    def resume(self, folder: Path, identity: dict[str, str], emit: Emitter) -> bool:
        """As `Engine.resume`."""

    @abstractmethod
    def run(self, loop: Loop, evaluate: Evaluate | None) -> TrainResult:
        """Train to the end."""

    def close(self) -> None:  # noqa: B027 (nothing to give back is the rule)
        """Give back what was opened."""

    def _loop(self, loop: Loop, evaluate: Evaluate | None, folder: Path, *, turn: int = 0, done: int = 0) -> TrainResult:
        prepared, model = self.prepared, self.model
        feed = feed_of(prepared, turn)
        result = train(model.tuned, Learner(prepared.task, model), feed, settings=prepared.parts.train, emit=loop.emit,
                       seed=prepared.run.file.seed + turn, evaluate=evaluate, goal=Goal(*goal_of(prepared)), folder=folder,
                       log=loop.log, resume=self.checkpoint, identity=loop.identity, floor_rate=loop.floor_rate,
                       ahead=self.ahead, before_step=lambda step: model.remote.begin(done + step))
        self.checkpoint = None
        self.samples += rows_used(feed, result.step)
        return result


class Alone(Training):
    """One party with the owner's back."""

    def resume(self, folder: Path, identity: dict[str, str], emit: Emitter) -> bool:
        """From the newest whole checkpoint."""
        self.checkpoint = resumable(folder, self.prepared, identity, emit)
        return self.checkpoint is not None

    def run(self, loop: Loop, evaluate: Evaluate | None) -> TrainResult:
        """One run of the loop."""
        return self._loop(loop, evaluate, loop.folder / "checkpoints")


class InRounds(Training):
    """Joint rounds: train from the common values, send, take the mean."""

    def __init__(self, prepared: Prepared, model: FrontModel, window: int, *, state: PartyState, which: str, party: str,
                 connect: Callable[[], Asked], guard: UpdateGuard | None) -> None:
        super().__init__(prepared, model, window)
        steps = planned_steps(prepared.parts.train, feed_of(prepared))
        if steps is None:
            raise SettingsError("train.max_time alone does not say how long a round is", hint="Give train.max_steps or epochs: "
                                "they count for each round.")
        self.steps = steps
        self.state, self.which, self.party, self.guard = state, which, party, guard
        self.coordinator = connect()
        self.first = {name: tensor.clone() for name, tensor in model.tuned.delta_state().items()}
        self._results: list[TrainResult] = []

    def resume(self, folder: Path, identity: dict[str, str], emit: Emitter) -> bool:
        """In the round that was under way."""
        notes = self.state.read(self.which)
        if "round" not in notes:
            return False
        self.checkpoint = latest_checkpoint(_place(folder, notes["round"]), emit)
        log = folder / "events.jsonl"
        if self.checkpoint is not None:
            check_same(self.checkpoint, self.prepared.parts.train, identity)
            self.checkpoint.rewind(log)
        elif log.exists() and log.stat().st_size > notes["log"]:
            with log.open("r+b") as file:
                file.truncate(notes["log"])
        return True

    def run(self, loop: Loop, evaluate: Evaluate | None) -> TrainResult:
        """All rounds; the tuned front then has the common values."""
        began = time.perf_counter()
        someone = Participant(self.party, self.state.folder / ROUNDS, self.coordinator.ask,
                              lambda number, common: self._round(number, common, loop, evaluate), wait=_wait, guard=self.guard,
                              secret=self.state.noise_key)
        (self.state.folder / ROUNDS).mkdir(parents=True, exist_ok=True)
        self._take(someone.run())
        self.rounds = max(self.rounds, self.state.read(self.which).get("round", 1) - 1)
        metrics = dict(evaluate(self.model.tuned)) if evaluate is not None else {}
        if metrics:
            loop.emit(Evaluated(step=self.rounds * self.steps, metrics=metrics))
        shutil.rmtree(loop.folder / "checkpoints", ignore_errors=True)
        return _summed(self._results, self.rounds * self.steps, metrics, time.perf_counter() - began)

    def _round(self, number: int, common: Mapping[str, Tensor], loop: Loop, evaluate: Evaluate | None) -> Trained:
        if number == 1:
            loop.emit(Acted(step=0, action="joined", reason="the values tuned on the emulators are joined first"))
            return self.first, len(self.prepared.examples)
        turn = number - 2
        done = turn * self.steps
        place = _place(loop.folder, number)
        notes = self.state.read(self.which)
        if notes.get("round") != number:
            shutil.rmtree(loop.folder / "checkpoints", ignore_errors=True)
            self.checkpoint = None
            self.state.write(self.which, notes | {"round": number, "log": loop.log.stat().st_size})
            loop.emit(Acted(step=done, action="round", reason=f"round {number - 1} begins from the common values"))
        elif self.checkpoint is None:
            shutil.rmtree(place, ignore_errors=True)
        self._take(common)
        shifted = replace(loop, emit=Emitter([lambda event: loop.emit(_later(event, done))]))
        self._results.append(self._loop(shifted, evaluate, place, turn=turn, done=done))
        self.rounds = turn + 1
        values = {name: tensor.clone() for name, tensor in self.model.tuned.delta_state().items()}
        return values, rows_used(feed_of(self.prepared, turn), self.steps)

    def _take(self, common: Mapping[str, Tensor]) -> None:
        own = self.model.tuned.delta_state()
        self.model.tuned.load_delta_state({name: tensor.to(own[name].dtype) if name in own else tensor
                                           for name, tensor in common.items()})

    def close(self) -> None:
        """The way to the coordinator."""
        self.coordinator.close()


@dataclass(frozen=True)
class OverGrpc:
    """Rounds that the owner itself holds."""

    channel: GrpcChannel

    def ask(self, request: RoundRequest) -> RoundReply:
        """As `Asked.ask`."""
        reply: RoundReply = self.channel.submit(request).result()
        return reply

    def close(self) -> None:
        """The stream of the rounds."""
        self.channel.close()


def rows_used(feed: Feed, steps: int) -> int:
    """The rows of the first `steps` optimizer steps: a party's weight in a round, the same whether it was killed or not."""
    used, epoch, left = 0, 0, steps
    while left > 0:
        plan = feed.steps(epoch)[:left]
        used += sum(len(micro) for step in plan for micro in step)
        left, epoch = left - len(plan), epoch + 1
    return used


def _place(folder: Path, number: int) -> Path:
    return folder / "checkpoints" / f"round-{number}"


def _wait(stand: StandReply) -> None:
    time.sleep(PAUSE if stand.seconds is None else min(PAUSE, max(0.01, stand.seconds)))


def _later(event: Event, done: int) -> Event:
    """The event with its step counted over all rounds."""
    names = {field.name for field in fields(event)}
    changes: dict[str, Any] = {"step": getattr(event, "step") + done} if "step" in names else {}  # noqa: B009
    if isinstance(event, Started) and event.total_steps is not None:
        changes["total_steps"] = event.total_steps + done
    return replace(event, **changes)


def _summed(results: list[TrainResult], steps: int, metrics: dict[str, float], seconds: float) -> TrainResult:
    """All rounds of this process as one result; `seconds` includes the waiting for others."""
    peaks = [result.peak_memory_bytes for result in results if result.peak_memory_bytes is not None]
    return TrainResult(step=steps, total_steps=steps, epochs=sum(result.epochs for result in results), reason="rounds are over",
                       seconds=seconds, evaluation_seconds=sum(result.evaluation_seconds for result in results),
                       saving_seconds=sum(result.saving_seconds for result in results),
                       tokens=sum(result.tokens for result in results), metrics=metrics, best_step=None,
                       peak_memory_bytes=max(peaks, default=None))
