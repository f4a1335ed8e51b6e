from __future__ import annotations

import os
import signal
import threading

import pytest

from deltaloom.errors import Interrupted
from deltaloom.events import Acted, Evaluated, Finished, Step
from deltaloom.train.checkpoints import latest_checkpoint
from deltaloom.train.settings import TrainSettings
from deltaloom.train.signals import polite_stop
from tests.train.pieces import LanguageTask, Log, assert_same, held_out_loss, run, state_of, tuned_model

SETTINGS = TrainSettings(max_steps=6, batch_size=6, eval_every=3, save_every=100)


class Interrupting(LanguageTask):
    """Sends signals to this process in the middle of the n-th step."""

    def __init__(self, at: int, number: int, times: int = 1) -> None:
        self.at, self.number, self.times, self.calls = at, number, times, 0

    def loss(self, tuned, batch):
        self.calls += 1
        if self.calls == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
        return super().loss(tuned, batch)


def one_micro(settings):
    from tests.train.pieces import feed

    return feed(settings, micro_tokens=10_000)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [2, 3])
def test_a_signal_lets_the_step_finish_saves_and_can_be_resumed(number, at, tmp_path):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    tuned, log = tuned_model(), Log()
    with pytest.raises(Interrupted) as error:
        run(tuned, SETTINGS, log, task=Interrupting(at, number), feed=one_micro(SETTINGS), folder=tmp_path,
            evaluate=held_out_loss)
    assert error.value.exit_code == 130
    assert f"step-{at}" in str(error.value)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert len(log.of(Step)) == at
    assert log.of(Evaluated) == []  # also where one was due: who stops does not want to wait for it
    assert (log.events[-1].reason, log.events[-1].step) == ("interrupted", at)
    assert isinstance(log.events[-1], Finished)
    assert number.name in log.of(Acted)[0].reason
    later = Log()
    run(tuned, SETTINGS, later, feed=one_micro(SETTINGS), folder=tmp_path, evaluate=held_out_loss,
        resume=latest_checkpoint(tmp_path, later.emit))
    whole, expected = tuned_model(), Log()
    run(whole, SETTINGS, expected, feed=one_micro(SETTINGS), evaluate=held_out_loss)
    assert_same(state_of(tuned), state_of(whole))
    assert [e.metrics for e in log.of(Evaluated) + later.of(Evaluated)] == [e.metrics for e in expected.of(Evaluated)]


def test_a_second_signal_stops_at_once(tmp_path):
    log = Log()
    with pytest.raises(KeyboardInterrupt):
        run(tuned_model(), SETTINGS, log, task=Interrupting(2, signal.SIGTERM, times=2), feed=one_micro(SETTINGS),
            folder=tmp_path, evaluate=held_out_loss)
    assert len(log.of(Step)) == 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_without_a_folder_it_says_that_nothing_was_written():
    with pytest.raises(Interrupted, match="No checkpoint was written"):
        run(tuned_model(), TrainSettings(max_steps=5, batch_size=6), task=Interrupting(1, signal.SIGINT),
            feed=one_micro(TrainSettings(batch_size=6)))


def test_a_signal_in_the_last_step_is_a_completed_run():
    settings = TrainSettings(max_steps=2, batch_size=6)
    assert run(tuned_model(), settings, task=Interrupting(2, signal.SIGINT), feed=one_micro(settings)).reason == "completed"


def test_other_threads_train_without_handlers():
    results = []

    def work():
        with polite_stop() as stop:
            results.append((bool(stop), signal.getsignal(signal.SIGINT)))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [(False, before)]
