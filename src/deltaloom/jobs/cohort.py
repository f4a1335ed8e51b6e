"""Trials of a search that one worker trains together: each an ordinary tuning run in stages, on a lane of the common model.

A trial is prepared, joins the cohort, and is finished when its training has ended, while the others wait; then the study gives
the next one its place. Trials that need another model or other rows than those that are being trained begin when these are done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from deltaloom.errors import DeltaloomError, Interrupted
from deltaloom.jobs.engine import Here
from deltaloom.jobs.searchfile import SearchRun
from deltaloom.jobs.trial import Bench, Watch, conclude, silent, trial_run
from deltaloom.jobs.tune import Stages, finished, in_stages
from deltaloom.search.study import Asked, Study
from deltaloom.train.cohort import Cohort, Left, Member
from deltaloom.train.modes import training_mode
from deltaloom.train.run import TrainResult

Done = Callable[[Asked], None]


def carry_out_together(run: SearchRun, study: Study, bench: Bench, done: Done) -> None:
    """Do trials until the budget is spent, as many at once as `search.cohort` says; `done` is told each that was closed.

    Raises:
        Interrupted, KeyboardInterrupt: the search is to stop; trials that were being trained stay open.
    """
    waiting: Asked | None = None
    while True:
        table = _Table(run, study, bench, done, waiting)
        waiting = table.train()
        bench.clear()
        if table.fault:  # nobody knows in which state the model is
            bench.drop()
        if waiting is None and not table.fault:
            return
        if waiting is None and (waiting := study.next()) is None:
            return


def lane_of(asked: Asked) -> str:
    """The name of a trial's lane."""
    return f"trial-{asked.number}"


@dataclass
class _Seat:
    """A trial's place. `seconds`: what it took besides its part in the cohort."""

    asked: Asked
    stages: Stages[Here]
    member: Member | None = None
    seconds: float = 0.0

    @property
    def lane(self) -> str:
        return lane_of(self.asked)

    def spent(self) -> float:
        return self.seconds + (self.member.seconds if self.member is not None else 0.0)


@dataclass
class _Table:
    """The trials that share one model from its first trial to its last."""

    run: SearchRun
    study: Study
    bench: Bench
    done: Done
    waiting: Asked | None                 # has been asked for and needs a place
    seats: list[_Seat] = field(default_factory=list)
    cohort: Cohort | None = None
    fault: bool = False                   # a trial failed in a way that nobody foresaw: no other one begins on this model
    interrupted: Interrupted | None = None

    def train(self) -> Asked | None:
        """All trials that can be done here; gives back one that needs another model or other rows."""
        with ExitStack() as self._stack:
            self._stack.callback(self._leave)
            while True:
                while len(self.seats) < self.run.settings.cohort and self._ask():
                    self._sit()
                if not self.seats:
                    break
                for left in self.cohort.step() if self.cohort is not None else ():
                    self._close(next(seat for seat in self.seats if seat.member is left.member), left)
        if self.interrupted is not None:
            raise self.interrupted
        if self.cohort is not None and self.cohort.stop:
            raise Interrupted("interrupted between trials", hint="Everything is kept: run again with --resume.")
        return self.waiting

    def _ask(self) -> bool:
        """Whether a trial waits that can begin now."""
        if self.fault or self.interrupted is not None or (self.cohort is not None and self.cohort.stop):
            return False
        if self.waiting is None:
            self.waiting = self.study.next()
        if self.waiting is None or self.cohort is None:
            return self.waiting is not None
        try:
            return self.bench.takes(trial_run(self.run, self.waiting))
        except DeltaloomError:
            return True  # beginning it will say what is wrong with it

    def _sit(self) -> None:
        """The trial that waits begins, or is closed with what it failed of."""
        asked, self.waiting = self.waiting, None
        if asked is None:
            return
        seat = _Seat(asked, self._stages(asked))
        try:
            with self._timed(seat), self._no_lane():
                training = next(seat.stages)
            engine = training.engine
            if self.cohort is None:
                self.cohort = self._stack.enter_context(Cohort(engine.tuned, engine.prepared.task))
            seat.member = self.cohort.join(engine.start(training.loop), seat.lane)
        except Exception as error:
            self._conclude(seat, error)
            return
        self.seats.append(seat)

    def _stages(self, asked: Asked) -> Stages[Here]:
        """The trial's run; its settings are looked at when it begins."""
        watch, lane = Watch(asked, self.study.objectives[0].name), lane_of(asked)
        return (yield from in_stages(trial_run(self.run, asked), lambda prepared: self.bench.engine_on(lane, prepared),
                                     overwrite=True, say=silent, sinks=[watch], make_ready=self.bench.prepare, show=False))

    def _close(self, seat: _Seat, left: Left) -> None:
        self.seats.remove(seat)
        self._conclude(seat, left.outcome)

    def _conclude(self, seat: _Seat, outcome: TrainResult | Exception) -> None:
        """Finish a trial whose training has ended, take its lane off, and tell the study."""
        began = time.perf_counter()

        def result() -> dict[str, Any]:
            try:
                if self.cohort is None or seat.member is None:
                    return finished(seat.stages, outcome)
                with self.cohort.tuned.use(seat.lane), training_mode(self.cohort.tuned, False):
                    return finished(seat.stages, outcome)
            finally:
                self.bench.clear(seat.lane)

        try:
            self.fault |= conclude(self.run, self.study.objectives, seat.asked, result,
                                   lambda: seat.spent() + time.perf_counter() - began)
        except Interrupted as error:
            self.interrupted = error
            return
        self.done(seat.asked)

    @contextmanager
    def _timed(self, seat: _Seat) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            seat.seconds += time.perf_counter() - began

    @contextmanager
    def _no_lane(self) -> Iterator[None]:
        """A lane that is added within the block is not in use after it."""
        if self.cohort is None:
            yield
            return
        with self.cohort.tuned.use(None):
            yield

    def _leave(self) -> None:
        """Give back what trials hold that were not closed."""
        for seat in self.seats:
            seat.stages.close()
