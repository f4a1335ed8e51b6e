"""Adaptive ranks on the command line: what a run leaves, its report, `inspect`, conversion, and what is refused untouched."""

import json
import shutil

import pytest

from deltaloom.jobs.runfile import read_run_file
from deltaloom.jobs.tune import tune
from tests.jobs.small import files_of, run_values, write_run

ADALORA = {"method": "adalora", "rank": 1, "reserve": 3, "start": 0.2, "end": 0.4, "every": 2}
# 8 steps, start 1: decisions after steps 2, 4 and, the last, 5


@pytest.fixture(scope="module")
def run_folder(models, tmp_path_factory):
    """A finished run, made once."""
    folder = tmp_path_factory.mktemp("adaptive")
    path = write_run(folder, run_values("prompts", models, folder, [ADALORA], max_steps=8))
    tune(read_run_file(path, []), say=lambda text: None)
    return folder


def events(folder, kind):
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def test_a_run_ends_smaller_than_it_began(run_folder):
    found = json.loads((run_folder / "run" / "metrics.json").read_text())
    changes = events(run_folder / "run", "RankChanged")
    assert [change["step"] for change in changes] == [2, 4, 5]
    assert 0 < found["final_parameters"] == changes[-1]["parameters"] < found["trainable_parameters"]
    sites = sum(row["sites"] for row in events(run_folder / "run", "Attached")[0]["table"])
    assert sum(map(sum, changes[-1]["ranks"].values())) == sites
    assert not [event for event in events(run_folder / "run", "Warned") if event["kind"] in ("budget", "unchanged", "peft")]
    page = (run_folder / "run" / "report.html").read_text()
    assert 'id="ranks"' in page and "importance" in page.lower()
    assert (run_folder / "run" / "delta" / "peft" / "adapter_model.safetensors").is_file()


def test_inspect_shows_every_layers_rank(run_folder, command):
    found = command.json("inspect", run_folder / "run")
    (last,) = events(run_folder / "run", "RankChanged")[-1:]
    assert found["parameters"] == last["parameters"]
    sites = found["sites"]
    assert sorted(site["rank"] for site in sites) == sorted(rank for rows in last["ranks"].values() for rank in rows)
    assert len({site["rank"] for site in sites}) > 1
    done = command("inspect", run_folder / "run")
    text = done.out + done.err
    for site in sites:
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [site["site"]]]
        assert line.split()[2] == str(site["rank"])


def test_conversion_to_plain_low_rank_is_exact(run_folder, tmp_path, command):
    assert command.json("convert", run_folder / "run", "--to", "lora", "-o", tmp_path / "lora")["relative_error"] < 1e-6
    assert command.json("convert", run_folder / "run", "--to", "peft", "-o", tmp_path / "peft")["relative_error"] == 0
    dev = run_folder / "dev.jsonl"
    model = json.loads((run_folder / "run" / "metrics.json").read_text())["metrics"]
    for place in (run_folder / "run", tmp_path / "lora"):
        scored = command.json("eval", place, "--data", dev)
        assert scored["metrics"]["loss"] == pytest.approx(model["loss"], rel=1e-5)


def test_training_goes_on_from_it(run_folder, tmp_path, models, command):
    values = run_values("prompts", models, tmp_path, [{"from": str(run_folder / "run")}], max_steps=8)
    on = command.json("tune", write_run(tmp_path, values))
    first = json.loads((run_folder / "run" / "metrics.json").read_text())
    assert on["trainable_parameters"] == on["final_parameters"] == first["final_parameters"]
    assert not [event for event in events(tmp_path / "run", "Warned") if event["kind"] == "budget"]


def test_a_resumed_run_is_the_same(models, tmp_path, command):
    path = write_run(tmp_path, run_values("prompts", models, tmp_path, [ADALORA], max_steps=8, save_every=1, keep_checkpoints=9))
    command.json("tune", path)
    delta = files_of(tmp_path / "run" / "delta")
    for step in (6, 7, 8):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step}")
    before = files_of(tmp_path / "run")
    for change in ("deltas.0.end=0.3", "deltas.0.every=1", "deltas.0.beta1=0.5", "deltas.0.importance=gradient"):
        message = command.refused("tune", path, "--resume", "-s", change)
        assert "another run" in message and "deltas" in message
    assert files_of(tmp_path / "run") == before
    command.json("tune", path, "--resume")
    assert files_of(tmp_path / "run" / "delta") == delta


BAD = {
    "deltas.0.rank=20": "initial rank is more than these layers can have",
    "deltas.0.reserve=0.5": "reserve",
    "deltas.0.end=0.8": "below 1",
    "deltas.0.every=5": "longer than the run",
    "train.max_steps=1": "longer than the run",
    "deltas.0.start=1": "start",
}


@pytest.mark.parametrize("change", BAD)
def test_a_mistake_is_refused_before_anything_of_an_earlier_run_is_gone(change, run_folder, command):
    before = files_of(run_folder / "run")
    message = command.refused("tune", run_folder / "run.yaml", "--overwrite", "-s", change)
    assert BAD[change] in message
    assert files_of(run_folder / "run") == before


def test_epochs_are_counted_too(run_folder, models, tmp_path, command):
    values = run_values("prompts", models, tmp_path, [ADALORA], max_steps=None, epochs=1, batch_size=40)
    assert "1 optimizer steps" in command.refused("tune", write_run(tmp_path, values))
    assert not (tmp_path / "run").exists()
