"""A choice among methods on the command line: the plain list that a run leaves, its report, resuming, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from tests.jobs.small import files_of, run_values, write_run

AUTO = {"method": "auto", "budget": 700, "start": 0.2, "end": 0.4, "every": 2}


def events(folder, kind):
    return [record for record in map(json.loads, (folder / "events.jsonl").read_text().splitlines()) if record["event"] == kind]


def test_a_run_ends_as_a_plain_list_that_is_trained_anew(models, tmp_path, command):
    path = write_run(tmp_path, run_values("classes", models, tmp_path, [AUTO], max_steps=8, save_every=1, keep_checkpoints=9))
    found, run = command.json("tune", path), tmp_path / "run"
    assert 0 < found["final_parameters"] <= 700 < found["trainable_parameters"]
    changes = events(run, "RankChanged")
    assert [change["step"] for change in changes] == [2, 4, 5] and changes[-1]["parameters"] == found["final_parameters"]
    names = {method["method"] for method in found["methods"]}
    assert "auto" not in names and names <= {"lora", "bottleneck", "prefix", "bitfit"}
    stated = yaml.safe_load((run / "deltas.yaml").read_text())
    assert stated == {"deltas": found["methods"]}
    (settled,) = [event for event in events(run, "Acted") if event["action"] == "settled"]
    assert all(name in settled["reason"] for name in names)
    page = (run / "report.html").read_text()
    assert 'id="ranks"' in page and "settled" in page
    assert command.json("inspect", run)["parameters"] == found["final_parameters"] + found["head_parameters"]
    assert command.json("eval", run, "--data", tmp_path / "dev.jsonl")["metrics"] == found["metrics"]

    delta = files_of(run / "delta")
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.split("-")[1]) > 3:
            shutil.rmtree(folder)
    command.json("tune", path, "--resume")
    assert files_of(run / "delta") == delta

    other = write_run(tmp_path, run_values("classes", models, tmp_path, stated["deltas"], max_steps=1) | {
        "output": str(tmp_path / "anew")})
    assert command.json("tune", other)["trainable_parameters"] == found["final_parameters"]
    assert not (tmp_path / "anew" / "deltas.yaml").exists()


@pytest.mark.parametrize(("change", "text"), [
    ("deltas.0.budget=3", "too small to keep anything"), ("deltas.0.budget=900000", "nothing to choose"),
    ("deltas.0.budget=120%", "at most 100%"), ("deltas.0.candidates=[{method: loraa}]", "Did you mean 'lora'"),
    ("train.max_steps=1", "longer than the run")])
def test_mistakes_are_refused_before_anything_is_written(change, text, models, tmp_path, command):
    path = write_run(tmp_path, run_values("classes", models, tmp_path, [AUTO], max_steps=8))
    assert text in command.refused("tune", path, "-s", change)
    assert not (tmp_path / "run").exists()


def test_a_strategy_that_grows_has_another_budget(models, tmp_path, command):
    values = run_values("classes", models, tmp_path, [AUTO], max_steps=8, eval_every=2)
    path = write_run(tmp_path, values | {"strategy": {"target_metric": {"accuracy": 0.9}}})
    assert "strategy.grow: false" in command.refused("tune", path)
    command.json("tune", path, "-s", "strategy.grow=false", "-s", "strategy.biases=false")
