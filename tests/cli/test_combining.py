"""Presets, gates, merges and several deltas at once, by the commands."""

import json

import pytest
import yaml

from tests.jobs.small import Command, run_values, write_run


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):
    """Folders of finished runs: a gated preset on classes and on texts, two low-rank changes of texts."""
    patch = pytest.MonkeyPatch()
    folders = {}
    for name, kind, deltas in (("gates", "classes", [{"preset": "unipelt", "bottleneck": {"size": 4}, "prefix": {"length": 2}}]),
                               ("texts", "prompts", [{"preset": "unipelt", "bottleneck": {"size": 4}, "prefix": {"length": 2}}]),
                               ("one", "prompts", [{"method": "lora", "rank": 2}]),
                               ("two", "prompts", [{"method": "lora", "rank": 3, "targets": ["q", "v"]}])):
        folder = tmp_path_factory.mktemp(name)
        Command(patch).json("tune", write_run(folder, run_values(kind, models, folder, deltas, learning_rate=3e-2)))
        folders[name] = folder / "run"
    patch.undo()
    return folders


def test_the_resolved_run_file_holds_the_presets_list(runs):
    deltas = yaml.safe_load((runs["gates"] / "run.yaml").read_text())["deltas"]
    assert [(entry["method"], entry["delta"]["method"]) for entry in deltas] == [
        ("gated", "prefix"), ("gated", "bottleneck"), ("gated", "lora")]
    assert deltas[1]["delta"]["size"] == 4 and deltas[1]["start"] == 0.5


@pytest.mark.parametrize("name", ["gates", "texts"])
def test_a_gated_delta_is_saved_and_used_as_in_its_run(runs, tmp_path, command, name):
    stored = json.loads((runs[name] / "metrics.json").read_text())
    found = command.json("eval", runs[name], "--data", runs[name].parent / "dev.jsonl")
    assert found["metrics"] == pytest.approx(stored["metrics"])
    assert command.json("predict", runs[name], "--data", runs[name].parent / "dev.jsonl", "-o", tmp_path / "p.jsonl")["rows"] > 0
    assert command.json("inspect", runs[name])["parameters"] > 0
    assert "cannot be merged" in command.refused("merge", runs[name], "-o", tmp_path / "merged")


def test_several_deltas_compose_or_average(runs, models, tmp_path, command):
    rows, both = runs["one"].parent / "dev.jsonl", ("--delta", runs["one"], "--delta", runs["two"])
    command.json("combine", runs["one"], runs["two"], "--weights", "0.5,0.25", "-o", tmp_path / "sum")
    want = command.json("eval", models["llama"], "--delta", tmp_path / "sum", "--data", rows, "--task", "causal-lm")["metrics"]
    summed = command.json("eval", models["llama"], *both, "--weights", "0.5,0.25", "--data", rows)["metrics"]
    assert summed == pytest.approx(want, rel=2e-3)
    stacked = command.json("eval", models["llama"], *both, "--data", rows)["metrics"]
    whole = command.json("eval", models["llama"], *both, "--weights", "1,1", "--data", rows)["metrics"]
    assert stacked == pytest.approx(whole, rel=2e-3) and stacked != pytest.approx(want, rel=2e-3)  # low-rank changes add up
    assert command.json("predict", models["llama"], *both, "--data", rows, "-o", tmp_path / "p.jsonl")["rows"] > 0


def test_ways_to_combine(runs, tmp_path, command):
    sources = (runs["one"], runs["two"])
    found = command.json("combine", *sources, "--how", "ties", "--density", 0.3, "--rank", 4, "-o", tmp_path / "ties")
    assert 0 < found["relative_error"] < 1
    assert found["sites"] and all(site["rank"] <= 4 and 0 <= site["relative_error"] < 1 for site in found["sites"].values())
    again = [command.json("combine", *sources, "--how", "dare", "--seed", 3, "-o", tmp_path / f"dare{index}") for index in (1, 2)]
    first, second = ((tmp_path / f"dare{index}" / "delta.safetensors").read_bytes() for index in (1, 2))
    assert again[0]["relative_error"] == 0 and first == second
    assert "how far" in command.refused("combine", *sources, "--how", "svd", "-o", tmp_path / "svd")
    assert not (tmp_path / "svd").exists()


def test_bad_input_is_refused(runs, models, command):
    rows = runs["one"].parent / "dev.jsonl"
    assert "several deltas" in command.refused("eval", models["llama"], "--delta", runs["one"], "--weights", "1", "--data", rows)
    message = command.refused("eval", models["llama"], "--delta", runs["one"], "--delta", runs["gates"], "--data", rows)
    assert "different tasks" in message
