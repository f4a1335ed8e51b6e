"""The section `strategy` on the command line: what a run leaves, its report, resuming, and what is refused before training."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.jobs.small import files_of, run_values, write_run

ADALORA = {"method": "adalora", "rank": 1, "reserve": 3, "start": 0.0, "end": 0.1, "every": 2}
LORA = {"method": "lora", "rank": 1}


def events(folder, kind):
    return [record for record in map(json.loads, (folder / "events.jsonl").read_text().splitlines()) if record["event"] == kind]


def values(models, folder, strategy, deltas=(ADALORA,), **train):
    return run_values("classes", models, folder, list(deltas), **train) | {"strategy": strategy}


def test_a_run_tells_what_its_strategy_did_and_repeats_it(models, tmp_path, command):
    eager = {"target_metric": {"loss": 0.0}, "plateau": {"patience": 1, "min_delta": 9.0, "times": 1}, "grow": {"patience": 1},
             "overfitting": False, "divergence": False}
    path = write_run(tmp_path, values(models, tmp_path, eager, max_steps=8, eval_every=1, save_every=1, keep_checkpoints=9,
                                      learning_rate=1e-9))
    found = command.json("tune", path)
    run = tmp_path / "run"
    actions = [(event["step"], event["action"]) for event in events(run, "Acted")]
    assert actions and actions[0][1] == "lower_rate"
    page = (run / "report.html").read_text()
    assert "lower_rate" in page and "has not become better in 1 evaluations" in page
    assert {row["method"] for row in events(run, "Attached")[0]["table"]} >= {"adalora", "bitfit"}
    assert found["trainable_parameters"] == sum(
        row["parameters"] for row in events(run, "Attached")[0]["table"] if row["method"] == "adalora")
    assert "target_metric" in (run / "run.yaml").read_text()
    delta = files_of(run / "delta")
    for name in [path.name for path in (run / "checkpoints").iterdir() if int(path.name.split("-")[1]) > 3]:
        shutil.rmtree(run / "checkpoints" / name)
    before = files_of(run)
    message = command.refused("tune", path, "--resume", "-s", "strategy.plateau.patience=2")
    assert "another run" in message and "strategy" in message
    assert files_of(run) == before
    again = command.json("tune", path, "--resume")
    assert files_of(run / "delta") == delta
    assert again["reason"] == found["reason"] and again["steps"] == found["steps"]
    assert [(event["step"], event["action"]) for event in events(run, "Acted") if event["action"] != "resumed"] == actions


def test_a_target_that_is_met_ends_the_run(models, tmp_path, command):
    path = write_run(tmp_path, values(models, tmp_path, {"target_metric": {"accuracy": 0.0}}, [LORA], eval_every=2))
    found = command.json("tune", path)
    assert (found["reason"], found["steps"]) == ("target_met", 2)
    assert [method["method"] for method in found["methods"]] == ["lora"]
    assert command.json("eval", tmp_path / "run", "--data", tmp_path / "dev.jsonl")["metrics"] == found["metrics"]


@pytest.mark.parametrize(("change", "text"), [
    ("strategy.target_metric={accuracyy: 1}", "strategy.target_metric names no metric"),
    ("data.eval=null", "nothing to evaluate on"),
    ("strategy.grow={}", "needs a method that can grow"), ("train.early_stop={patience: 2}", "both decide when to stop"),
    ("strategy.plato={}", "Did you mean 'plateau'"), ("train.metric=loss", "different metrics"),
    ("strategy.plateau.factor=2", "strategy.plateau"), ("strategy=3", "strategy")])
def test_mistakes_are_refused_before_anything_is_written(change, text, models, tmp_path, command):
    path = write_run(tmp_path, values(models, tmp_path, {"target_metric": {"accuracy": 0.9}}, [LORA]))
    assert text in command.refused("tune", path, "-s", change)
    assert not (tmp_path / "run").exists()
