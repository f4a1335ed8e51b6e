"""Searches in processes of their own: killed as a whole, and with several workers."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.jobs.small import run_values, write_run
from tests.search.pieces import ROOT

pytestmark = pytest.mark.slow


def start(path, *more):
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen([sys.executable, "-c", "from deltaloom.cli.main import main; main()", "search", str(path), "--json",
                             *more], env={**os.environ, "PYTHONPATH": source}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def values_of(models, folder, **settings):
    values = run_values("classes", models, folder, [{"method": "lora", "rank": {"int": [1, 4]}}], max_steps=4)
    values["train"]["learning_rate"] = {"log": [1e-3, 1e-1]}
    return values | {"search": {"trials": 5, "objectives": ["loss"], "pruner": "none"} | settings}


def wait_for(folder, trials):
    until = time.monotonic() + 250
    while not (folder / "trials" / f"{trials - 1:04d}" / "events.jsonl").exists():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.timeout(600)
def test_a_killed_search_goes_on_and_ends_as_an_uninterrupted_one(models, tmp_path):
    path = write_run(tmp_path, values_of(models, tmp_path, keep="all"))
    worker = start(path)
    wait_for(tmp_path / "run", 3)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    resumed = start(path, "--resume")
    out, err = resumed.communicate()
    assert resumed.returncode == 0, err
    whole = start(path, "-s", f"output={tmp_path / 'whole'}")
    expected = json.loads(whole.communicate()[0])
    found = json.loads(out)
    assert "was cut off" in err
    kept = [trial for trial in found["trials"] if trial["state"] != "lost"]
    assert len(kept) == 5 and len(found["trials"]) == 6

    def results(trials):
        return sorted((json.dumps(trial["settings"]), trial["values"]["loss"]) for trial in trials)

    assert results(kept) == results(expected["trials"])
    assert found["best"]["settings"] == expected["best"]["settings"]


@pytest.mark.timeout(600)
def test_a_killed_search_of_cohorts_goes_on_and_repeats_nothing_finished(models, tmp_path):
    path = write_run(tmp_path, values_of(models, tmp_path, keep="all", cohort=3, sampler="random", trials=7))
    worker = start(path)
    wait_for(tmp_path / "run", 5)  # the second cohort has begun
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    resumed = start(path, "--resume")
    out, err = resumed.communicate()
    assert resumed.returncode == 0, err
    whole = start(path, "-s", f"output={tmp_path / 'whole'}", "-s", "search.cohort=1")
    expected = json.loads(whole.communicate()[0])["trials"]
    found = json.loads(out)["trials"]
    lost = [trial for trial in found if trial["state"] == "lost"]
    kept = [trial for trial in found if trial["state"] != "lost"]
    assert 1 <= len(lost) <= 3 and len(kept) == 7 and {trial["state"] for trial in kept} == {"complete"}
    assert {trial["number"] for trial in lost} == {trial["again"] for trial in kept if trial["again"] is not None}

    def results(trials):
        return sorted((json.dumps(trial["settings"]), trial["values"]["loss"]) for trial in trials)

    for (settings, loss), (other, value) in zip(results(kept), results(expected), strict=True):
        assert settings == other and loss == pytest.approx(value, rel=1e-5)


@pytest.mark.timeout(600)
def test_two_workers_of_one_command_share_the_work(models, tmp_path):
    path = write_run(tmp_path, values_of(models, tmp_path, workers=2, trials=6))
    process = start(path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    found = json.loads(out)
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 6
    assert sorted(trial["number"] for trial in found["trials"]) == list(range(6))
    assert (tmp_path / "run" / "workers" / "1.lock").exists()
