"""Two processes do what one does: the same rows in a step, the same numbers within rounding, the same decisions."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deltaloom.data.batches import dealt
from deltaloom.deltas.route import Route
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.train.loop import train
from deltaloom.train.processes import processes
from deltaloom.train.settings import TrainSettings
from deltaloom.train.sharding import check_shard
from deltaloom.train.team import SINGLE, Single
from tests.train.pieces import LanguageTask, assert_same, feed, rows, state_of, tuned_model
from tests.train.teamwork import ADAPTIVE, MORE, PLAIN, WORK, half, resumed, source

ROOT = Path(__file__).parents[2]
Done = Callable[[str], tuple[dict[str, torch.Tensor], dict[str, Any]]]


def started(folder: Path, *names: str) -> str:
    """Two processes at work; what they print."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "tests.train.teamwork", str(folder), *names], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All work, done once by two processes."""
    place = tmp_path_factory.mktemp("team")
    half(SINGLE, place)
    started(place)
    return place


@pytest.fixture
def both(folder: Path) -> Done:
    """Tensors and facts of a piece of work, which both processes have alike, to the last bit."""

    def read(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        states = [load_file(folder / f"{name}-{number}.safetensors") for number in range(2)]
        assert_same(*states)
        return states[0], json.loads((folder / f"{name}-0.json").read_text())

    return read


def alone(name: str, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The same work in this process, as JSON gives it back."""
    state, facts = (WORK | MORE)[name](SINGLE, folder)
    return state, json.loads(json.dumps(facts))


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], rtol: float, atol: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_course(one: dict[str, Any], other: dict[str, Any], rel: float = 1e-5) -> None:
    assert len(one["losses"]) == len(other["losses"]) > 0
    for mine, yours in zip(one["losses"], other["losses"], strict=True):
        assert mine == pytest.approx(yours, rel=rel)
    assert [(step, best) for step, _, best in one["metrics"]] == [(step, best) for step, _, best in other["metrics"]]
    assert [m["loss"] for _, m, _ in one["metrics"]] == pytest.approx([m["loss"] for _, m, _ in other["metrics"]], rel=rel)
    assert one["ranks"] == other["ranks"]


# ---- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 12])
def test_every_row_of_a_step_is_dealt_once_and_alike(size, count):
    lengths = [example.length for example in rows(count)] if count else []
    parts = [dealt(range(count), lengths, number, size) for number in range(size)]
    assert sorted(index for part in parts for index in part) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert not count or parts[0][0] == max(range(count), key=lambda index: (lengths[index], -index))
    sums = [sum(lengths[index] for index in part) for part in parts]
    assert max(sums) - min(sums) <= 2 * max(lengths, default=0)


def test_the_steps_do_not_depend_on_the_number_of_processes():
    feed = source(PLAIN)
    steps = feed.steps(1)
    for step in steps:
        whole = sorted(index for micro in step for index in micro)
        for size in (1, 2, 3):
            assert sorted(index for number in range(size) for micro in feed.dealt(step, number, size) for index in micro) == whole
    assert any(not feed.dealt(step, 1, 2) for step in steps), "no step leaves a process without rows"
    assert any(len(feed.dealt(step, 0, 2)) > 1 for step in steps), "no process has several micro-batches"


# ---- one process and two ----------------------------------------------------------------------------------------------


def test_one_process_makes_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with processes() as team:
        assert team is SINGLE and not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "1")
    with processes() as team:
        assert team is SINGLE and not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(SettingsError, match="WORLD_SIZE"), processes():
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="MASTER_ADDR"), processes():
        pass


def test_two_processes_are_one_within_rounding(both, folder):
    """In float64: penalties, a controller, clipping, AdamW, accumulation, a step in which one process has no row."""
    state, facts = both("plain")
    expected, known = alone("plain", folder)
    assert_close(state, expected, rtol=1e-9, atol=1e-12)
    assert_same_course(facts, known)
    assert (facts["tokens"], facts["step"]) == (known["tokens"], known["step"])


@pytest.mark.parametrize("name", ADAPTIVE)
def test_ranks_are_decided_alike(name, both, folder):
    """In float32, with values that a warm-up computes: the same ranks at the same steps, and nearly the same tensors."""
    state, facts = both(name)
    expected, known = alone(name, folder)
    assert len(facts["ranks"]) > 1
    assert_same_course(facts, known, rel=1e-3)
    assert_close(state, expected, rtol=1e-3, atol=1e-4)


def test_gradients_are_those_of_ddp_weighed_by_tokens(both):
    state, _ = both("ddp")
    ours, book = ({name.split("/", 1)[1]: tensor for name, tensor in state.items() if name.startswith(which)}
                  for which in ("ours/", "ddp/"))
    assert_close(ours, book, rtol=1e-4, atol=1e-7)  # this task's loss is in float32, and its batches are others


def test_rules_act_alike_and_measure_the_noise_of_all_micro_batches(both, folder):
    state, facts = both("strategic")
    expected, known = alone("strategic", folder)
    assert_close(state, expected, rtol=1e-9, atol=1e-12)
    assert facts["rate"] == known["rate"] < 1
    lowered = [[step, action] for step, action in known["acted"] if action == "lower_rate"]
    assert [[step, action] for step, action in facts["acted"] if action == "lower_rate"] == lowered
    noise = [json.loads((folder / f"strategic-{number}.json").read_text())["noise"] for number in range(2)]
    assert noise[0] == noise[1] and all(state[3] for state in noise[0])
    assert [state[2] > 0 for state in noise[0]] == [True] * len(noise[0])


def test_what_stops_one_process_stops_both(folder):
    found = [json.loads((folder / f"stopping-{number}.json").read_text()) for number in range(2)]
    assert found[0] == found[1]
    assert found[0]["early"] == ["early_stop", 3]      # by the first one's values, which get worse
    assert found[0]["late"][0] == "max_time" and found[0]["late"][1] <= 4  # by its times, of 0.1 seconds a step at least
    assert found[0]["planned"] >= 1


# ---- dropout and going on ---------------------------------------------------------------------------------------------


def test_an_interrupted_pair_saves_and_goes_on_as_one(both, folder):
    """The signal came to process 1 alone."""
    _, facts = both("half")
    assert facts["message"].startswith("Interrupted: interrupted at step 7 of 14") and facts["message"].endswith("True")
    expected, known = alone("plain", folder)
    state, course = resumed(2)(SINGLE, folder)
    assert_close(state, expected, rtol=1e-9, atol=1e-12)
    assert_same_course(json.loads(json.dumps(course)), known | {
        "losses": known["losses"][7:], "metrics": [each for each in known["metrics"] if each[0] > 7]})


def test_one_process_goes_on_as_a_pair(both, folder):
    state, _ = both("resumed")
    expected, _ = alone("plain", folder)
    assert_close(state, expected, rtol=1e-9, atol=1e-12)


def test_with_dropout_a_resumed_pair_ends_bit_for_bit_the_same(folder):
    found = [load_file(folder / f"dropout-{number}.safetensors") for number in range(2)]
    assert_same(*found)
    whole, again = ({name[2:]: tensor for name, tensor in found[0].items() if name.startswith(which)} for which in ("0/", "1/"))
    assert_same(whole, again)
    (first, first_again), (other, other_again) = (json.loads((folder / f"dropout-{number}.json").read_text())["seeds"]
                                                  for number in range(2))
    assert set(first_again) < set(first) and set(other_again) < set(other)  # the last four steps of six
    assert len(first) == 6 and not set(first) & set(other), "both processes draw the same masks for their different rows"


# ---- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "kinds", "words", "code"), [
    ("nan", ["NonFiniteError", "NonFiniteError"], "non-finite at step 2", 1),
    ("memory", ["ElsewhereError", "ResourceError"], "out of memory in a training step", 3),
    ("odd", ["ElsewhereError", "ValueError"], "this row is odd", None)])
def test_a_failure_in_one_process_ends_both_with_its_message(how, kinds, words, code, folder):
    found = [json.loads((folder / f"{how}-{number}.json").read_text()) for number in range(2)]
    assert [each["kind"] for each in found] == kinds
    assert all(words in each["message"] for each in found)
    assert code is None or [each["code"] for each in found] == [code, code]
    assert found[0]["told"]
    if how == "nan":
        assert all(f"row {each['row']}" in each["message"] for each in found), "the row lies at the other process"
    else:
        assert found[0]["message"].startswith("process 1 of 2 failed: ")


def test_a_killed_process_is_noticed_by_the_other(folder):
    kind, message = json.loads((folder / "gone.json").read_text())
    assert kind == "ElsewhereError" and "gone" in message and "--resume" in message


def test_what_else_is_sent_arrives(folder):
    for number in range(2):
        tensors, facts = load_file(folder / f"exchanging-{number}.safetensors"), json.loads(
            (folder / f"exchanging-{number}.json").read_text())
        assert tensors["tensor"].tolist() == [[0, 1, 2], [3, 4, 5]] and tensors["mask"].tolist() == [True, False]
        assert (facts["numbers"], facts["text"], facts["nothing"]) == ([0.1, math.inf, None], "ä", None)
        assert facts["texts"] == ["", "ä"]
        assert facts["squares"] == [{"square": n * n, "third": n / 3} for n in range(7)]
        assert "process 1 differs from process 0" in facts["drifted"]
        assert "JSONDecodeError" in facts["failed"]


# ---- a base spread over the processes ---------------------------------------------------------------------------------


def assert_spread(name: str, folder: Path) -> None:
    """Trained as a whole base, also where a process has fewer micro-batches, or none: it keeps step."""
    states = [load_file(folder / f"{name}-{number}.safetensors") for number in range(2)]
    facts = [json.loads((folder / f"{name}-{number}.json").read_text()) for number in range(2)]
    assert_same(*states)
    expected, known = alone(name, folder)
    assert_close(states[0], expected, rtol=1e-3, atol=1e-5)
    assert_same_course(facts[0], known, rel=1e-4)
    assert facts[0]["calls"] == facts[1]["calls"] < known["calls"]
    assert max(each["here"] for each in facts) < 0.95 * facts[0]["whole"]


def test_a_spread_base_trains_as_a_whole_one(folder):
    assert_spread("sharded", folder)


@pytest.mark.slow
def test_every_method_trains_on_a_spread_base(tmp_path):
    started(tmp_path, *MORE)
    for name in MORE:
        assert_spread(name, tmp_path)


def test_what_learns_from_a_processs_own_rows_is_refused_in_several():
    class Two(Single):
        size = 2

    tuned = tuned_model([Route(delta={"method": "prefix", "length": 2}, pool=2, top=1)])
    before = state_of(tuned)
    with pytest.raises(RefusedError, match="rows that a process sees"):
        train(tuned, LanguageTask(), feed(TrainSettings(batch_size=8)), settings=TrainSettings(batch_size=8), team=Two())
    assert_same(before, state_of(tuned))


def test_one_process_has_nothing_to_spread_over():
    with pytest.raises(SettingsError, match="torchrun"):
        check_shard(TrainSettings(shard=True), SINGLE)
    check_shard(TrainSettings(), SINGLE)
