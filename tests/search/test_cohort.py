"""Searches whose worker trains several trials at once: the same trials, folders and endings as one after another."""

import json

import pytest
import torch
from safetensors.torch import load_file

from deltaloom.errors import SettingsError
from deltaloom.jobs import trial as trial_job
from deltaloom.jobs.prepare import prepare
from deltaloom.search.settings import SearchSettings
from deltaloom.search.study import Asked
from deltaloom.train import cohort as cohort_module
from tests.jobs.small import run_values, write_run
from tests.search.pieces import interrupted_at

LORA = {"method": "lora", "rank": {"choice": [1, 2]}, "dropout": {"choice": [0.0, 0.3]}}
LOST_TARGET = {"method": "lora", "targets": "nothing-like-it"}


def values_of(models, folder, *, deltas=None, train=None, **search):
    values = run_values("classes", models, folder, deltas or {"choice": [[LORA], [{"method": "prefix", "length": 3}]]},
                        max_steps=5, eval_every=2)
    values["train"] |= {"learning_rate": {"log": [1e-3, 1e-2]}} | (train or {})
    return values | {"search": {"trials": 5, "objectives": ["loss"], "sampler": "random", "pruner": "none", "keep": "all",
                                "cohort": 3} | search}


def passes(monkeypatch):
    """How many trials took each common pass."""
    counts, together = [], cohort_module.Cohort._together
    monkeypatch.setattr(cohort_module.Cohort, "_together", lambda self, group: counts.append(len(group)) or together(self, group))
    return counts


def lines(folder):
    """A run's events without what is measured in time and memory."""
    kept = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    for event in kept:
        for key in ("seconds", "memory_bytes", "floor_share", "time", "bytes", "reason"):
            event.pop(key, None)
    return kept


def assert_near(one, other, path=""):
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_near(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_near(a, b, f"{path}[{index}]")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6), path
    else:
        assert one == other, path


def test_trials_of_a_cohort_are_the_trials_one_by_one_with_the_same_folders(models, tmp_path, command, monkeypatch):
    counts = passes(monkeypatch)
    path = write_run(tmp_path, values_of(models, tmp_path))
    together = command.json("search", path)
    assert max(counts) == 3
    alone = command.json("search", path, "-s", f"output={tmp_path / 'alone'}", "-s", "search.cohort=1")
    assert [trial["state"] for trial in together["trials"]] == ["complete"] * 5
    for one, other in zip(together["trials"], alone["trials"], strict=True):
        assert one["settings"] == other["settings"]
        folders = [folder / "trials" / f"{one['number']:04d}" for folder in (tmp_path / "run", tmp_path / "alone")]
        names = [sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
                 for folder in folders]
        assert names[0] == names[1]
        assert_near(*(lines(folder) for folder in folders))
        metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
        for found in metrics:
            for key in ("seconds", "tokens_per_second", "peak_memory_bytes", "evaluation_seconds", "saving_seconds"):
                found.pop(key)
        sizes = [found.pop("delta_bytes") for found in metrics]  # its norms are written as text
        assert abs(sizes[0] - sizes[1]) < 100
        assert_near(*metrics)
        states = [load_file(folder / "delta" / "delta.safetensors") for folder in folders]
        for name in states[0]:
            torch.testing.assert_close(states[0][name], states[1][name], atol=1e-5, rtol=1e-5)


def test_failed_pruned_and_refused_trials_give_their_places_to_the_next(models, tmp_path, command, monkeypatch):
    told = Asked.told
    monkeypatch.setattr(Asked, "told", lambda self, value: told(self, value) or self.number == 1)
    loads = []
    monkeypatch.setattr(trial_job, "prepare", lambda run, parts, **more: loads.append(run) or prepare(run, parts, **more))
    deltas = {"choice": [[{"method": "lora", "rank": 1}], [LOST_TARGET], [{"method": "lora", "rank": 40}]]}
    values = values_of(models, tmp_path, deltas=deltas, trials=9, sampler="grid", constraints={"parameters": "<= 5000"},
                       train={"learning_rate": {"choice": [1e-3, 2e-3, 4e-3]}, "precision": "fp32"})
    found = command.json("search", write_run(tmp_path, values))
    states = {trial["settings"]["deltas"]: trial["state"] for trial in found["trials"] if trial["number"] != 1}
    named = {trial["settings"]["deltas"] for trial in found["trials"]}
    assert len(named) == 3 and len(found["trials"]) == 9
    assert sorted(set(states.values())) == ["complete", "failed", "infeasible"]
    assert len(loads) == 1, "model and rows are loaded once"


def test_an_interrupted_cohort_leaves_its_trials_open_and_goes_on(models, tmp_path, command, monkeypatch):
    path = write_run(tmp_path, values_of(models, tmp_path, deltas=[LORA]))
    with interrupted_at(1, monkeypatch):
        assert "interrupted" in command.refused("search", path, code=130)
    found = command.json("search", path, "--resume")
    states = [trial["state"] for trial in found["trials"]]
    assert states[:3] == ["lost"] * 3 and states.count("complete") == 5 and len(states) == 8
    whole = command.json("search", path, "-s", f"output={tmp_path / 'whole'}")

    def results(trials):
        return sorted((json.dumps(trial["settings"]), trial["values"]["loss"]) for trial in trials if trial["state"] != "lost")

    for (one, a), (other, b) in zip(results(found["trials"]), results(whole["trials"]), strict=True):
        assert one == other and a == pytest.approx(b, rel=1e-6)


def test_trials_of_other_rows_wait_until_the_others_are_done(models, tmp_path, command, monkeypatch):
    counts = passes(monkeypatch)
    values = values_of(models, tmp_path, deltas=[{"method": "lora", "rank": 1}], trials=4, sampler="grid",
                       train={"learning_rate": {"choice": [1e-3, 2e-3]}, "precision": {"choice": ["fp32", "bf16"]}})
    found = command.json("search", write_run(tmp_path, values))
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 4
    assert set(counts) <= {2, 3}


def test_what_a_trial_shares_is_no_objective():
    with pytest.raises(SettingsError, match="seconds"):
        SearchSettings.parse({"cohort": 2, "objectives": ["loss", "seconds"]}, "search")
    with pytest.raises(SettingsError, match="peak_memory_bytes"):
        SearchSettings.parse({"cohort": 2, "constraints": {"peak_memory_bytes": "<= 1e9"}}, "search")
    assert SearchSettings.parse({"objectives": ["seconds"]}, "search").cohort == 1
