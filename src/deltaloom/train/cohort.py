"""Several runs trained at once over one frozen base: a cohort. What comes of each is what comes of it alone.

Every run has a lane of one tuned model, and everything else of its own: order of rows, optimizer, schedule, clipping,
controllers, strategy, random generators, evaluations, checkpoints, and a reason to stop. Only the passes are common: the next
rows of several runs are one batch in which each run's rows lie together, the frozen layers run once for all of them, and one
backward pass gives every lane its gradients, which depend on its own rows alone because the base is frozen. Then each run ends
its step by itself (`Run.end_step`). It pays because a small step leaves the machine idle: a step of more than `ROOM` tokens
fills it anyway, and is taken alone.

Dropout draws for each run from that run's generator, in the shape that its rows would have alone (`kernels.dropout`), so that
who else is in the cohort decides nothing. On accelerators the masks are of other random numbers than alone.

A run leaves when it is done, or with the error that ended it; the others go on. What cannot share a pass, or fails in one,
takes its steps alone from there on, and its events say why.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deltaloom.architectures import NOT_BY_ROW
from deltaloom.data.batches import Batch, sizes_of
from deltaloom.deltas.base import InputDelta
from deltaloom.errors import RefusedError
from deltaloom.events import Warned
from deltaloom.kernels.dropout import Stream, by_streams
from deltaloom.train.feed import MICRO_TOKENS, ExampleFeed
from deltaloom.train.loop import Start, between_steps
from deltaloom.train.memory import PeakMemory
from deltaloom.train.modes import faster_dropout, gradient_checkpointing, training_mode
from deltaloom.train.run import Run, TrainResult
from deltaloom.train.signals import StopRequest, polite_stop
from deltaloom.train.state import random_states, set_random_states
from deltaloom.train.team import Passed
from deltaloom.tuned import Tuned

ROOM = MICRO_TOKENS  # tokens of a common pass with padding: with more of them it is no faster than several passes
CHEAP = 256          # tokens of padding that cost less than a pass of their own


class RowLearner(Protocol):
    """What a cohort needs of a task besides its loss."""

    def loss(self, tuned: Tuned, batch: Batch) -> tuple[Tensor, Tensor | float]:
        """As `run.Learner`."""

    def row_losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(the sum of each row's losses, what it counts), both (rows,); their sums are what `loss` gives."""


@dataclass
class Member:
    """A run in a cohort. `seconds` is what it took so far: its own work, and its share of common passes."""

    lane: str
    run: Run
    feed: ExampleFeed
    states: dict[str, Any]  # of the random generators, as it left them
    apart: str | None       # why it takes its steps alone
    seconds: float = 0.0

    def examples(self, rows: Sequence[int]) -> list[Any]:
        """What is at these indices."""
        return [self.feed.examples[index] for index in rows]


@dataclass(frozen=True)
class Left:
    """A run that has left its cohort: with its result, or with what ended it."""

    member: Member
    outcome: TrainResult | Exception


class Cohort:
    """Runs that share a tuned model and a task: a context manager, to which `join` adds runs and whose `step` takes their steps.

    Within the block the model is in training mode and signals only note that the runs are to stop.
    """

    def __init__(self, tuned: Tuned, task: RowLearner, room: int = ROOM) -> None:
        self.tuned, self.task, self.room = tuned, task, room
        self.members: list[Member] = []
        self.stop = StopRequest()
        self._stack = ExitStack()

    def __enter__(self) -> Cohort:
        self.stop = self._stack.enter_context(polite_stop())
        self._stack.callback(set_random_states, random_states())
        self._stack.enter_context(training_mode(self.tuned, True))
        self._stack.enter_context(faster_dropout(self.tuned))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def join(self, start: Start, lane: str) -> Member:
        """A run on a lane of the model begins.

        Raises:
            As `train`; the cohort is as it was.
        """
        began = time.perf_counter()
        if not isinstance(start.feed, ExampleFeed):
            raise RefusedError("a cohort makes its batches from examples", got=type(start.feed).__name__, legal="an ExampleFeed")
        with self.tuned.use(lane):
            start.check()
            run = start.run(PeakMemory(self.tuned.device, shared=True))
            apart = why_apart(self.tuned, run, start.feed, self.task)
        member = Member(lane, run, start.feed, random_states(), apart)
        self._say_apart(member)
        member.seconds = time.perf_counter() - began
        self.members.append(member)
        return member

    def step(self) -> list[Left]:
        """One optimizer step of every run, and before it what is due between steps; gives back the runs that ended instead."""
        left = []
        ready: list[tuple[Member, Sequence[Sequence[int]]]] = []
        for member in list(self.members):
            try:
                with self._acting(member):
                    reason = between_steps(member.run, self.stop)
                    if reason is not None:
                        left.append(Left(member, member.run.finish(reason)))
                    else:
                        ready.append((member, member.run.begin_step()))
            except Exception as error:  # whatever it is, it is this run's alone
                left.append(Left(member, error))
        for group in self._groups(ready):
            left += self._taken(group)
        gone = {id(each.member) for each in left}
        self.members = [member for member in self.members if id(member) not in gone]
        return left

    # ---- who shares a pass ----------------------------------------------------------------------------------------

    def _groups(self, ready: Sequence[tuple[Member, Sequence[Sequence[int]]]]) -> list[list[_Turn]]:
        """Steps of one micro-batch in groups of like lengths, within the room of a pass; all others by themselves."""
        turns = [_Turn(member, micro, max(example.length for example in member.examples(micro[0]))) for member, micro in ready]
        groups = [[turn] for turn in turns if turn.member.apart is not None or len(turn.micro) > 1]
        open_group: list[_Turn] = []
        for turn in sorted((turn for turn in turns if turn.member.apart is None and len(turn.micro) == 1),
                           key=lambda turn: turn.width):
            rows = sum(other.rows for other in open_group)
            wider = (turn.width - open_group[-1].width) * rows if open_group else 0
            if open_group and (wider > CHEAP or turn.width * (rows + turn.rows) > self.room):
                groups.append(open_group)
                open_group = []
            open_group.append(turn)
        return [*groups, open_group] if open_group else groups

    def _taken(self, group: Sequence[_Turn]) -> list[Left]:
        """The steps of a group; gives back the runs that ended in it."""
        if len(group) == 1:
            return self._alone(group[0])
        try:
            passes = self._together(group)
            if passes is None:
                return [each for turn in group for each in self._alone(turn)]
        except Exception as error:  # nobody knows whose it is: each is tried by itself
            left = []
            for turn in group:
                turn.member.apart = str(error).split("\n")[0] or type(error).__name__
                turn.member.run.optimizer.zero_grad()
                self._say_apart(turn.member)
                left += self._alone(turn)
            return left
        left = []
        for turn, (passed, spent) in zip(group, passes, strict=True):
            turn.member.seconds += spent
            try:
                with self._acting(turn.member):
                    turn.member.run.end_step(passed, spent)
            except Exception as error:
                left.append(Left(turn.member, error))
        return left

    def _alone(self, turn: _Turn) -> list[Left]:
        run = turn.member.run
        try:
            with self._acting(turn.member), gradient_checkpointing(self.tuned, run.settings.gradient_checkpointing):
                run.take_step(turn.micro)
        except Exception as error:
            return [Left(turn.member, error)]
        return []

    # ---- the common pass ------------------------------------------------------------------------------------------

    def _together(self, group: Sequence[_Turn]) -> list[tuple[Passed, float]] | None:
        """One pass over the rows of several runs: for each what its rows came to, and its share of the seconds.

        None where these rows cannot be told apart. Random states are taken on only if it went well.
        """
        began = time.perf_counter()
        feed = group[0].member.feed
        batch = feed.collate([example for turn in group for example in turn.member.examples(turn.micro[0])])
        batch = batch if self.tuned.device.type == "cpu" else batch.to(self.tuned.device)
        stops = [sum(turn.rows for turn in group[:count + 1]) for count in range(len(group))]
        spans = [slice(stop - turn.rows, stop) for stop, turn in zip(stops, group, strict=True)]
        found = [sizes_of(batch, span.start, span.stop) for span in spans]
        sizes = [each for each in found if each is not None]
        if len(sizes) < len(found):
            return None
        streams = [Stream(turn.member.lane, _generator(turn.member), turn.rows, size.widths)
                   for turn, size in zip(group, sizes, strict=True)]
        before = _global_state(self.tuned.device)
        with self.tuned.use([turn.member.lane for turn in group for _ in range(turn.rows)]), by_streams(streams):
            losses, counts = self.task.row_losses(self.tuned, batch)
        if any(not torch.equal(one, other) for one, other in zip(before, _global_state(self.tuned.device), strict=True)):
            raise RefusedError("this model draws random numbers in a way that cannot be told apart by rows")
        losses.sum().backward()
        for turn, stream in zip(group, streams, strict=True):
            turn.member.states["torch"] = stream.generator.get_state()
        kept, spent = losses.detach(), time.perf_counter() - began
        padded = sum(size.padded_tokens for size in sizes)
        return [(Passed([kept[span].sum()], counts[span].sum(), [size.rows], size.tokens, size.padded_tokens),
                 spent * size.padded_tokens / padded) for span, size in zip(spans, sizes, strict=True)]

    @contextmanager
    def _acting(self, member: Member) -> Iterator[None]:
        """Within the block the model and the random generators are this run's."""
        began = time.perf_counter()
        set_random_states(member.states)
        try:
            with self.tuned.use(member.lane):
                yield
        finally:
            member.states = random_states()
            member.seconds += time.perf_counter() - began

    @staticmethod
    def _say_apart(member: Member) -> None:
        if member.apart is not None:
            member.run.emit(Warned(kind="cohort", message=f"this run takes its steps alone: {member.apart}"))


@dataclass(frozen=True)
class _Turn:
    """A run's next step."""

    member: Member
    micro: Sequence[Sequence[int]]
    width: int  # of the longest row of its first micro-batch

    @property
    def rows(self) -> int:
        return len(self.micro[0])


def why_apart(tuned: Tuned, run: Run, feed: ExampleFeed, task: RowLearner) -> str | None:
    """Why a run, whose lane is in use, cannot share a pass with others; None if nothing is known that speaks against it."""
    pairs = tuned.pairs()
    if run.task is not task:
        return "its task is not the cohort's"
    if run.settings.packing:
        return "its rows are packed into one"
    if run.settings.gradient_checkpointing:
        return "its activations are computed again in the backward pass"
    if any(isinstance(delta, InputDelta) for _, delta in pairs):
        return "its deltas put rows in front of the text"
    if tuned.readers():
        return "its deltas choose by the texts of the whole batch"
    shared = [site.name for site, _ in pairs if site.kind == "stack" or site.path.endswith(NOT_BY_ROW)]
    return f"{shared[0]} does not work row by row" if shared else None


def _generator(member: Member) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(member.states["torch"])
    return generator


def _global_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
