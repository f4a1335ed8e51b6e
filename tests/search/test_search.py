"""`deltaloom search` on tiny models: what it finds is what `tune` does, and what goes wrong is said."""

import json
import sys

import pytest
import yaml

from deltaloom.jobs import trial as trial_job
from deltaloom.jobs.prepare import prepare
from deltaloom.jobs.search import search
from deltaloom.jobs.searchfile import read_search_file
from deltaloom.search.study import Asked
from tests.jobs.small import files_of, run_values, write_run
from tests.search.pieces import interrupted_at

LORA = {"method": "lora", "rank": {"choice": [1, 2]}}
LOST_TARGET = {"method": "lora", "targets": "nothing-like-it"}


def search_values(models, folder, *, deltas=None, train=None, **settings):
    values = run_values("classes", models, folder, deltas or {"choice": [[LORA], [{"method": "bitfit"}]]}, max_steps=4)
    values["train"] |= {"learning_rate": {"log": [1e-3, 1e-1]}} | (train or {})
    return values | {"search": {"trials": 3, "objectives": ["loss"], "sampler": "random", "pruner": "none"} | settings}


def test_the_best_run_file_is_the_best_trial_bit_for_bit(models, tmp_path, command):
    found = command.json("search", write_run(tmp_path, search_values(models, tmp_path, keep="all", trials=4)))
    folder, best = tmp_path / "run", found["best"]
    losses = [trial["values"]["loss"] for trial in found["trials"]]
    assert best["value"] == min(losses) and best["number"] == losses.index(min(losses))
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 4
    assert found["pareto"] == [{key: found["trials"][best["number"]][key] for key in ("number", "settings", "values")}]
    assert set(found["trials"][0]) >= {"number", "state", "reason", "settings", "values", "seconds"}
    again = command.json("tune", folder / "best.yaml")
    assert again["metrics"]["loss"] == best["value"]
    assert (folder / "best/delta/delta.safetensors").read_bytes() == (
        folder / f"trials/{best['number']:04d}/delta/delta.safetensors").read_bytes()
    last = read_search_file(tmp_path / "run.yaml")
    parameters = {name: str(value) if name.endswith("rank") else value for name, value in found["trials"][3]["settings"].items()}
    values = last.space.values(parameters) | {"output": str(tmp_path / "alone")}
    assert command.json("tune", write_run(tmp_path, values, "alone.yaml"))["metrics"]["loss"] == losses[3]
    page = (folder / "report.html").read_text()
    assert "best.yaml" in page and "PED-ANOVA" in page and "<script" not in page
    assert json.loads((folder / "search.json").read_text())["best"] == best


def test_a_failing_trial_is_recorded_and_the_search_goes_on_and_is_resumed(models, tmp_path, command):
    values = search_values(models, tmp_path, deltas={"choice": [[LOST_TARGET], [{"method": "bitfit"}]]}, sampler="grid", trials=2,
                           train={"learning_rate": 0.01})
    path = write_run(tmp_path, values)
    found = command.json("search", path)
    failed, whole = sorted(found["trials"], key=lambda trial: trial["state"], reverse=True)
    assert failed["state"] == "failed" and "nothing-like-it" in failed["reason"] and whole["state"] == "complete"
    assert "not empty" in command.refused("search", path)
    before = files_of(tmp_path / "run" / "trials")
    again = command.json("search", path, "--resume", "-s", "search.trials=5")
    assert again["trials"] == found["trials"] and files_of(tmp_path / "run" / "trials") == before
    refused = command.refused("search", path, "--resume", "-s", "train.batch_size=4")
    assert "another search" in refused and "train.batch_size" in refused and "here 4, there 8" in refused
    (tmp_path / "dev.jsonl").write_text((tmp_path / "dev.jsonl").read_text() + '{"text": "a", "label": "good"}\n')
    assert "rows" in command.refused("search", path, "--resume")
    other = command.json("search", path, "--overwrite")
    assert len(other["trials"]) == 2 and other["trials"][0]["seconds"] != found["trials"][0]["seconds"]


@pytest.mark.parametrize("objectives", [["loss"], ["loss", "parameters"]])
def test_a_pruned_trial_ends_at_once_and_only_the_best_keep_their_deltas(objectives, models, tmp_path, command, monkeypatch):
    told = Asked.told
    monkeypatch.setattr(Asked, "told", lambda self, value: told(self, value) or self.number == 1)
    loads = []
    monkeypatch.setattr(trial_job, "prepare", lambda run, parts, **more: loads.append(run) or prepare(run, parts, **more))
    values = search_values(models, tmp_path, deltas=[LORA], objectives=objectives, train={"eval_every": 1}, trials=3)
    found = command.json("search", write_run(tmp_path, values))
    assert [trial["state"] for trial in found["trials"]] == ["complete", "pruned", "complete"]
    pruned = found["trials"][1]
    assert len(pruned["curve"]) == 1 and "at step 1 of 4" in pruned["reason"]
    events = [json.loads(line)["event"] for line in (tmp_path / "run/trials/0001/events.jsonl").read_text().splitlines()]
    assert events.count("Step") == 1
    assert len(loads) == 1, "model and rows are shared by the trials, also after one was ended in the middle"
    kept = {entry["number"] for entry in found["pareto"]}
    for number in range(3):
        assert (tmp_path / f"run/trials/{number:04d}/delta").exists() == (number in kept)


def test_an_interrupted_search_says_so_and_goes_on(models, tmp_path, command, monkeypatch):
    path = write_run(tmp_path, search_values(models, tmp_path, deltas=[LORA], train={"eval_every": 2}))
    with interrupted_at(1, monkeypatch):
        assert "interrupted" in command.refused("search", path, code=130)
    found = command.json("search", path, "--resume")
    assert [trial["state"] for trial in found["trials"]] == ["complete", "lost", "complete", "complete"]
    lost, again = found["trials"][1:3]
    assert again["again"] == 1 and again["settings"] == lost["settings"] and "trial 2" in lost["reason"]


def test_without_optuna_the_hint_says_what_to_install(models, tmp_path, command, monkeypatch):
    path = write_run(tmp_path, search_values(models, tmp_path))
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install 'deltaloom[search]'" in command.refused("search", path)


def test_constraints_before_and_after_training(models, tmp_path, command):
    deltas = {"choice": [[{"method": "lora", "rank": 2}], [{"method": "bitfit"}]]}
    values = search_values(models, tmp_path, deltas=deltas, sampler="grid", trials=2, train={"learning_rate": 0.01},
                           constraints={"parameters": "<= 400"})
    path = write_run(tmp_path, values)
    found = command.json("search", path)
    refused = next(trial for trial in found["trials"] if trial["settings"]["deltas"] == "lora")
    assert refused["state"] == "infeasible" and "parameters <= 400" in refused["reason"] and refused["curve"] == []
    assert found["best"]["settings"]["deltas"] == "bitfit" and found["best"]["value"] > 0
    output = ["-s", f"output={tmp_path / 'other'}"]
    said = command.refused("search", path, *output, "-s", "search.constraints.parameters='<= 10'")
    assert "nothing of the space meets the constraints" in said and "parameters <= 10" in said
    assert not (tmp_path / "other").exists()
    bound = "search.constraints={accuracy: '>= 2'}"
    said = command.refused("search", path, *output, "-s", bound, "-s", "search.trials=1", code=1)
    assert "no trial meets the constraints" in said
    assert json.loads((tmp_path / "other/search.json").read_text())["best"] is None


BAD = {
    "empty": (["train.learning_rate=0.1", "deltas=[{method: bitfit}]"], "the space is empty"),
    "log from zero": (["train.learning_rate={log: [0, 1]}"], "log has no zero"),
    "reversed": (["train.learning_rate={log: [1, 0.1]}"], "must be below"),
    "never legal": (["train.learning_rate={uniform: [-1, 1]}"], "train.learning_rate -1.0"),
    "nothing legal": (["train.batch_size=0"], "no combination of the space is a legal run"),
    "method": (["deltas={choice: [[{method: lora}], [{method: loora}]]}"], "Did you mean 'lora'"),
    "sampler": (["search.sampler=tpee"], "sampler"),
    "key": (["search.trails=3"], "trails"),
    "objective": (["search.objectives=[losss]"], "losss"),
    "constraint": (["search.constraints={losss: '<= 1'}"], "losss"),
    "pruner": (["search.objectives=[parameters]", "search.pruner=median"], "no metric"),
    "workers": (["search.workers=9"], "contradictory budgets"),
    "time": (["search.time=10s", "train.max_time=20s"], "contradictory budgets"),
    "grid": (["search.sampler=grid"], "every combination"),
    "no evaluation": (["data.eval=null"], "no"),
    "seed": (["seed={int: [0, 3]}"], "picks luck"),
    "storage": (["search.storage='nonsense://a'"], "cannot be opened"),
    "top": (["serach.trials=3"], "Did you mean 'search'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_trained(case, models, tmp_path, command):
    overrides, said = BAD[case]
    path = write_run(tmp_path, search_values(models, tmp_path))
    before = files_of(tmp_path)
    message = command.refused("search", path, *[part for override in overrides for part in ("-s", override)])
    assert said in message
    left = files_of(tmp_path)
    assert left == before


def test_other_commands_point_to_search(models, tmp_path, command):
    path = write_run(tmp_path, search_values(models, tmp_path))
    for name in ("tune", "plan"):
        message = command.refused(name, path)
        assert "deltaloom search" in message and "train.learning_rate" in message and message.count("\n") == 1
    settled = search_values(models, tmp_path) | {"deltas": [{"method": "bitfit"}]}
    settled["train"]["learning_rate"] = 0.1
    assert "deltaloom search" in command.refused("tune", write_run(tmp_path, settled))


def test_a_library_user_gets_the_same(models, tmp_path):
    values = search_values(models, tmp_path, trials=1)
    values["data"]["class_weights"] = {"choice": ["none", "balanced"]}
    path = write_run(tmp_path, values)
    lines = []
    found = search(read_search_file(path, ["search.sampler=tpe"]), say=lines.append)
    assert found["best"]["number"] == 0 and any(line.startswith("trial 0 (1 of 1): loss") for line in lines)
    assert yaml.safe_load((tmp_path / "run/best.yaml").read_text())["data"]["train"] == "../train.jsonl"
