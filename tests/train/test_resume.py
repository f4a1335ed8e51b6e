"""A run stopped anywhere and resumed gives bit for bit the tensors of an uninterrupted one."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltaloom.deltas.lora import LoRA
from deltaloom.deltas.prefix import Prefix
from deltaloom.deltas.prompt import Prompt
from deltaloom.errors import CheckpointError
from deltaloom.events import Acted, Emitter, Evaluated, JsonLines, Started, Step, Warned, read_events
from deltaloom.train.checkpoints import checkpoints, latest_checkpoint, read_checkpoint
from deltaloom.train.settings import EarlyStop, TrainSettings
from tests.train.pieces import (
    LanguageTask,
    Log,
    ToyMethod,
    assert_all_differ,
    assert_same,
    held_out_loss,
    run,
    small,
    state_of,
    tuned_model,
)

SETTINGS = TrainSettings(epochs=3, batch_size=6, learning_rate=1e-2, schedule="cosine", weight_decay=0.1, eval_every=2,
                         save_every=1, keep_checkpoints=100, early_stop=EarlyStop(patience=50))  # 12 steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder, its final tensors, its events."""
    folder, tuned, log = tmp_path_factory.mktemp("whole"), tuned_model(), Log()
    run(tuned, SETTINGS, log, folder=folder, evaluate=held_out_loss)
    return folder, state_of(tuned), log


def numbers(log: Log) -> list[tuple]:
    return [(event.step, event.loss, event.penalty, event.gradient_norm, event.learning_rate, event.tokens, event.epoch)
            for event in log.of(Step)] + [(event.step, event.metrics["loss"], event.best) for event in log.of(Evaluated)]


@pytest.mark.parametrize("step", [1, 3, 4, 6, 8, 11])
def test_resumed_from_any_step_it_ends_with_the_same_tensors_and_events(whole, step):
    folder, expected, events = whole
    torch.rand(step)
    random.random()
    tuned, log = tuned_model(), Log()
    result = run(tuned, SETTINGS, log, resume=read_checkpoint(folder / f"step-{step}"), evaluate=held_out_loss)
    assert_same(state_of(tuned), expected)
    assert result.step == 12
    assert numbers(log) == [numbers_ for numbers_ in numbers(events) if numbers_[0] > step]
    assert log.of(Started)[0].step == step


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_both_optimizers_and_less_frequent_reading(name, tmp_path):
    settings = TrainSettings(max_steps=7, batch_tokens=60, optimizer=name, save_every=3, log_every=2, keep_checkpoints=9)
    one, other = tuned_model(), tuned_model()
    run(one, settings, folder=tmp_path)
    run(other, settings, resume=read_checkpoint(tmp_path / "step-3"))
    assert_same(state_of(one), state_of(other))


def test_on_a_base_in_bf16_with_float32_deltas(tmp_path):
    settings = TrainSettings(max_steps=4, batch_size=6, learning_rate=1e-2, save_every=2)
    one, other = (tuned_model(model=small().bfloat16()) for _ in range(2))
    run(one, settings, folder=tmp_path)
    assert {tensor.dtype for tensor in one.delta_parameters().values()} == {torch.float32}
    run(other, settings, resume=read_checkpoint(tmp_path / "step-2"))
    assert_same(state_of(one), state_of(other))


ROWS_IN_FRONT = {"prompt": [Prompt(length=3)], "prefix": [Prefix(length=3)], "network": [Prefix(length=3, reparametrise=5)],
                 "with factors": [Prompt(length=2), Prefix(length=2, reparametrise=5), LoRA(rank=2)]}


@pytest.mark.parametrize("name", ROWS_IN_FRONT)
def test_prompts_and_prefixes_resume_stop_early_and_keep_their_best(name, tmp_path):
    """peft#2256: only what the network had made was kept, so no run could go on, stop early or restore its best."""
    settings = TrainSettings(max_steps=20, batch_size=6, learning_rate=1e-2, eval_every=2, save_every=1, keep_checkpoints=99,
                             early_stop=EarlyStop(patience=2), restore_best=True)
    values, seen = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.0}, {}

    def evaluate(begin):
        count = itertools.count(begin, 2)

        def measure(tuned):
            step = next(count)
            seen[step] = state_of(tuned)
            return {"loss": values[step]}
        return measure

    one, other = (tuned_model(ROWS_IN_FRONT[name]) for _ in range(2))
    whole = run(one, settings, folder=tmp_path, evaluate=evaluate(2))
    last = seen[8]
    assert (whole.reason, whole.step, whole.best_step) == ("early_stop", 8, 4)
    assert_same(state_of(one), seen[4])
    assert_all_differ(seen[4], last)
    again = run(other, settings, evaluate=evaluate(6), folder=tmp_path, resume=read_checkpoint(tmp_path / "step-5"))
    assert (again.reason, again.step, again.best_step) == ("early_stop", 8, 4)
    assert_same(seen[8], last)
    assert_same(state_of(other), state_of(one))


def test_a_named_delta_resumes_and_restores_beside_another(tmp_path):
    """transformers#24096, #28531: checkpoints of adapters with a name of their own were not found."""
    settings = TrainSettings(max_steps=4, batch_size=6, learning_rate=1e-2, eval_every=1, save_every=1, keep_checkpoints=9,
                             restore_best=True)
    ended = []
    for begin in (0, 3):
        tuned = tuned_model([LoRA(rank=2)])
        tuned.add("q_proj", [LoRA(rank=2)], seed=1)
        before = {key: tensor.clone() for key, tensor in tuned.delta_state("default").items()}
        scores = iter([3.0, 1.0, 2.0, 2.0][begin:])
        resume = read_checkpoint(tmp_path / "step-3") if begin else None
        result = run(tuned, settings, evaluate=lambda t, scores=scores: {"loss": next(scores)}, folder=tmp_path, resume=resume)
        assert result.best_step == 2
        assert_same(state_of(tuned), read_checkpoint(tmp_path / "step-2").parts["delta"])
        assert_same({key: tensor.clone() for key, tensor in tuned.delta_state("default").items()}, before)
        ended.append(state_of(tuned))
    assert_same(*ended)


def test_a_finished_run_has_nothing_to_do(whole):
    folder, expected, _ = whole
    tuned, log = tuned_model(), Log()
    result = run(tuned, SETTINGS, log, resume=read_checkpoint(folder / "step-12"), evaluate=held_out_loss)
    assert_same(state_of(tuned), expected)
    assert (result.reason, log.of(Step), log.of(Evaluated)) == ("completed", [], [])
    assert result.metrics == read_checkpoint(folder / "step-12").parts["progress"]["metrics"]


def scores(values):
    """An evaluation whose n-th call in the life of the run gives the n-th value; the model carries how often it was asked."""
    return lambda tuned: {"loss": values[int(tuned.asked)]}


def test_early_stop_remembers_what_was_before(tmp_path):
    values = [1.0, 0.5, 0.7, 0.6, 0.8, 0.4]
    settings = TrainSettings(max_steps=20, batch_size=6, eval_every=1, save_every=1, keep_checkpoints=100,
                             early_stop=EarlyStop(patience=3))
    whole, log = tuned_model(), Log()
    calls = itertools.count()
    result = run(whole, settings, log, evaluate=lambda tuned: {"loss": values[next(calls)]}, folder=tmp_path)
    assert (result.step, result.reason, result.best_step) == (5, "early_stop", 2)
    later = itertools.count(3)
    tuned = tuned_model()
    again = run(tuned, settings, evaluate=lambda t: {"loss": values[next(later)]}, resume=read_checkpoint(tmp_path / "step-3"))
    assert (again.step, again.reason, again.best_step) == (5, "early_stop", 2)
    assert_same(state_of(whole), state_of(tuned))
    stopped = run(tuned_model(), settings, evaluate=scores([]), resume=read_checkpoint(tmp_path / "step-5"))
    assert (stopped.step, stopped.reason) == (5, "early_stop")


def test_the_best_delta_survives_a_resume(tmp_path):
    settings = TrainSettings(max_steps=6, batch_size=6, eval_every=2, save_every=3, keep_checkpoints=1, restore_best=True)
    values = {2: 0.1, 4: 0.5, 6: 0.6}
    best = tuned_model()
    seen = {}

    def evaluate(tuned):
        step = 2 * (len(seen) + 1)
        seen[step] = state_of(tuned)
        return {"loss": values[step]}

    run(best, settings, folder=tmp_path, evaluate=evaluate)
    assert_same(state_of(best), seen[2])
    kept = [step for step, _ in checkpoints(tmp_path)]
    assert kept == [2, 6]
    again, log = tuned_model(), Log()
    run(again, settings, log, folder=tmp_path, evaluate=evaluate, resume=latest_checkpoint(tmp_path, log.emit))
    assert_same(state_of(again), seen[2])
    for file in (tmp_path / "step-2").iterdir():
        file.unlink()
    (tmp_path / "step-2").rmdir()
    run(again, settings, log, folder=tmp_path, evaluate=evaluate, resume=latest_checkpoint(tmp_path, log.emit))
    assert [event.kind for event in log.of(Warned)] == ["best-is-gone"]


@pytest.mark.parametrize(("change", "named"), [
    ({"learning_rate": 2e-2}, ["train.learning_rate", "0.01", "0.02"]),
    ({"schedule": "linear", "batch_size": 4}, ["train.schedule", "train.batch_size", "cosine"]),
    ({"epochs": 4}, ["train.epochs"]),
])
def test_other_settings_are_refused_by_name(whole, change, named):
    changed = TrainSettings(**{**SETTINGS.given(), **change})
    with pytest.raises(CheckpointError) as error:
        run(tuned_model(), changed, resume=read_checkpoint(whole[0] / "step-3"), evaluate=held_out_loss)
    assert all(word in str(error.value) for word in named)


def test_another_identity_is_refused(tmp_path):
    settings = TrainSettings(max_steps=1, batch_size=6)
    run(tuned_model(), settings, folder=tmp_path, identity={"data": "abc", "model": "m"})
    found = read_checkpoint(tmp_path / "step-1")
    with pytest.raises(CheckpointError, match="data: 'abc' in the checkpoint, 'xyz' now"):
        run(tuned_model(), settings, resume=found, identity={"data": "xyz", "model": "m"})


def test_another_delta_is_refused_and_untouched(whole):
    tuned = tuned_model([LoRA(rank=3), ToyMethod()])
    before = state_of(tuned)
    with pytest.raises(CheckpointError, match="does not fit"):
        run(tuned, SETTINGS, resume=read_checkpoint(whole[0] / "step-3"), evaluate=held_out_loss)
    assert_same(state_of(tuned), before)


def test_time_may_change_and_moves_the_end_in_proportion(tmp_path):
    settings = TrainSettings(max_time=0.3, batch_size=6, save_every=1, keep_checkpoints=100)
    run(tuned_model(), settings, folder=tmp_path)
    found = read_checkpoint(tmp_path / "step-1")
    planned = found.parts["progress"]["total_steps"]
    log = Log()
    result = run(tuned_model(), TrainSettings(max_time=0.6, batch_size=6, save_every=100), log, resume=found)
    assert result.total_steps == 2 * planned
    assert [event.action for event in log.of(Acted)][:1] == ["planned"]


def test_a_log_goes_on_where_the_checkpoint_was(tmp_path):
    log = tmp_path / "events.jsonl"
    settings = TrainSettings(max_steps=5, batch_size=6, save_every=2)
    sink = JsonLines(log)
    run_logged(settings, sink, tmp_path)
    sink.close()
    whole = [record["step"] for record in read_events(log) if record["event"] == "Step"]
    found = read_checkpoint(tmp_path / "c" / "step-4")
    assert found.rewind(log) > 0
    sink = JsonLines(log)
    run_logged(settings, sink, tmp_path, resume=found)
    sink.close()
    assert [record["step"] for record in read_events(log) if record["event"] == "Step"] == whole == [1, 2, 3, 4, 5]


def run_logged(settings, sink, folder, **options):
    from deltaloom.train.loop import train
    from tests.train.pieces import feed

    tuned = tuned_model()
    train(tuned, LanguageTask(), feed(settings), settings=settings, emit=Emitter([sink]), folder=folder / "c",
          log=folder / "events.jsonl", **options)
    return tuned


# ---- killed ---------------------------------------------------------------------------------------------------------

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from safetensors.torch import save_file
from deltaloom.train.checkpoints import latest_checkpoint
from deltaloom.train.settings import TrainSettings
from tests.train.pieces import Log, LanguageTask, held_out_loss, run, tuned_model

torch.set_num_threads(1)

class Slow(LanguageTask):
    def loss(self, tuned, batch):
        time.sleep(0.004)
        return super().loss(tuned, batch)

def child(folder, pipe):
    settings = TrainSettings(epochs=10, batch_size=6, learning_rate=1e-2, eval_every=5, save_every=2)
    tuned, log = tuned_model(), Log()
    resume = latest_checkpoint(folder / "c", log.emit)
    log.emit.sinks.append(lambda event: os.write(pipe, b"."))
    run(tuned, settings, log, task=Slow(), folder=folder / "c", evaluate=held_out_loss, resume=resume)
    save_file(tuned.delta_state(), folder / "end.safetensors")

def attempt(folder, delay):
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child(folder, theirs)
            status = 0
        finally:
            os._exit(status)
    if delay is not None:
        os.read(ours, 1)  # the loop begins
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]

folder, generator = Path(sys.argv[1]), random.Random(int(sys.argv[3]))
for name in ("killed", "whole"):
    (folder / name).mkdir()
hit = sum(attempt(folder / "killed", generator.uniform(0.02, 0.3)) != 0 for _ in range(int(sys.argv[2])))
print(hit, attempt(folder / "killed", None), attempt(folder / "whole", None))
"""


def check_kills(folder: Path, kills: int, seed: int) -> None:
    """Train in processes (forked from one that has imported everything) that are killed at random moments and resumed."""
    from safetensors.torch import load_file

    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(kills), str(seed)], cwd=Path(__file__).parents[2],
                          capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    hit, status, other = map(int, done.stdout.split())
    assert (status, other) == (0, 0), done.stderr
    assert hit > 0
    assert_same(load_file(folder / "killed" / "end.safetensors"), load_file(folder / "whole" / "end.safetensors"))


def test_killed_and_resumed_it_ends_the_same(tmp_path):
    check_kills(tmp_path, 3, seed=1)


@pytest.mark.slow
def test_killed_many_times_and_resumed_it_ends_the_same(tmp_path):
    check_kills(tmp_path, 25, seed=2)
