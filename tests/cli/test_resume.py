"""Interrupted runs go on bit for bit, seeds decide everything, nothing is lost, and training goes on from a delta."""

import json
import os
import signal

import pytest

from deltaloom.events import Step
from deltaloom.jobs.runfile import read_run_file
from deltaloom.jobs.tune import tune
from tests.jobs.small import files_of, records, run_values, write_rows, write_run

LORA, PREFIX = {"method": "lora", "rank": 2, "dropout": 0.2}, {"method": "prefix", "length": 3}
BOTTLENECK = {"method": "bottleneck"}


def tensors(folder):
    return (folder / "delta" / "delta.safetensors").read_bytes()


def interrupting(step):
    def sink(event):
        if isinstance(event, Step) and event.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
    return sink


@pytest.mark.parametrize(("kind", "deltas"), [("classes", [LORA]), ("prompts", [PREFIX, LORA])])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind, deltas, models, tmp_path, command):
    path = write_run(tmp_path, run_values(kind, models, tmp_path, deltas, max_steps=8, save_every=2))
    whole = command.json("tune", path)
    run = read_run_file(path, [f"output={tmp_path / 'cut'}"])
    with pytest.raises(BaseException, match="interrupted") as stopped:
        tune(run, say=lambda text: None, sinks=[interrupting(3)])
    assert stopped.value.exit_code == 130
    assert not (tmp_path / "cut" / "delta").exists()
    assert "--resume" in command.refused("tune", path, "-s", f"output={tmp_path / 'cut'}")
    assert "--resume" in command.refused("eval", tmp_path / "cut", "--data", tmp_path / "dev.jsonl")
    again = command.json("tune", path, "-s", f"output={tmp_path / 'cut'}", "--resume")
    assert tensors(tmp_path / "cut") == tensors(tmp_path / "run")
    assert again["metrics"] == whole["metrics"] and again["tokens"] == whole["tokens"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut/events.jsonl").read_text().splitlines()
             if json.loads(line)["event"] == "Step"]
    assert steps == list(range(1, 9))


def test_resuming_another_run_is_refused_and_changes_nothing(models, tmp_path, command):
    path = write_run(tmp_path, run_values("classes", models, tmp_path, [LORA]))
    command.json("tune", path)
    before = files_of(tmp_path / "run")
    for change in ("train.learning_rate=1", "seed=4", "deltas.0.rank=3"):
        assert "another run" in command.refused("tune", path, "--resume", "-s", change)
        assert files_of(tmp_path / "run") == before


def test_resuming_a_finished_run_gives_the_same(models, tmp_path, command):
    path = write_run(tmp_path, run_values("classes", models, tmp_path, [LORA]))
    first = command.json("tune", path)
    delta = tensors(tmp_path / "run")
    again = command.json("tune", path, "--resume")
    assert again["metrics"] == first["metrics"] and tensors(tmp_path / "run") == delta


def test_resume_without_a_checkpoint_starts_anew(models, tmp_path, command):
    path = write_run(tmp_path, run_values("classes", models, tmp_path, [LORA]))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.jsonl").write_text('{"event": "Step", "step": 1}\n')
    command.json("tune", path, "--resume")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/events.jsonl").read_text().splitlines()
             if json.loads(line)["event"] == "Step"]
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["classes", "prompts"])
def test_the_seed_decides_every_bit(kind, models, tmp_path, command):
    path = write_run(tmp_path, run_values(kind, models, tmp_path, [PREFIX, LORA]))
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        command.json("tune", path, "-s", f"output={tmp_path / name}", "-s", f"seed={seed}")
    assert tensors(tmp_path / "one") == tensors(tmp_path / "two") != tensors(tmp_path / "three")


def test_overwrite_replaces_a_run_and_nothing_else(models, tmp_path, command):
    path = write_run(tmp_path, run_values("classes", models, tmp_path, [LORA], save_every=1))
    command.json("tune", path)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert "--overwrite" in command.refused("tune", path)
    command.json("tune", path, "--overwrite", "-s", "train.max_steps=2")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert sorted(item.name for item in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-1", "step-2"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    assert "no run wrote" in command.refused("tune", path, "--overwrite", "-s", f"output={tmp_path / 'other'}")
    assert files_of(tmp_path / "other") == {"thesis.txt": b"mine"}


@pytest.mark.parametrize("change", ["deltas.0.targets=[nothing]", "data.train=missing.jsonl", "model=./nowhere",
                                    "train.metric=f7", "data.eval=null", "deltas.0.init=pissa"])
def test_a_mistake_with_overwrite_loses_nothing(change, models, tmp_path, command):
    values = run_values("classes", models, tmp_path, [LORA | {"rank": 20}], metric="loss")
    path = write_run(tmp_path, values)
    command.json("tune", path)
    before = files_of(tmp_path / "run")
    command.refused("tune", path, "--overwrite", "-s", change)
    assert files_of(tmp_path / "run") == before


@pytest.mark.parametrize("deltas", [[LORA], [PREFIX, BOTTLENECK]], ids=["lora", "prefix+bottleneck"])
def test_training_goes_on_from_a_delta(deltas, models, tmp_path, command):
    path = write_run(tmp_path, run_values("classes", models, tmp_path, deltas))
    first = command.json("tune", path)
    write_rows(tmp_path / "strange.jsonl", [{"text": f"helpful assistant write number {n}", "label": ["good", "bad"][n % 2]}
                                            for n in range(30)])
    further = write_run(tmp_path, {**run_values("classes", models, tmp_path, [{"from": "run"}], learning_rate=1e-9),
                                   "output": str(tmp_path / "further")}, "further.yaml")
    planned = command.json("plan", further)
    assert planned["trainable_parameters"] == first["final_parameters"] and planned["warnings"] == []
    on = command.json("tune", further)
    assert on["metrics"]["loss"] == pytest.approx(first["metrics"]["loss"], abs=1e-4)
    # the model before training is the bare one, and the methods are those of the delta
    assert on["methods"] == first["methods"] and on["head_parameters"] == first["head_parameters"]
    done = command("tune", further, "-s", "data.train=strange.jsonl", "-s", f"output={tmp_path / 'strange'}")
    assert done.code == 0 and "vocabulary occurred in the data of the earlier delta" in done.err
    assert "would replace the delta" in command.refused("tune", further, "--overwrite", "-s", f"output={tmp_path / 'run'}")
    assert "another task" in command.refused("tune", further, "--overwrite", "-s", "task=regression")
    assert "fingerprint" in command.refused("plan", further, "-s", f"model={models['other-bert']}")
    assert tensors(tmp_path / "run")


def test_labels_of_the_earlier_delta_stay(models, tmp_path, command):
    path = write_run(tmp_path, run_values("classes", models, tmp_path, [LORA]))
    command.json("tune", path)
    rows = [*records("text-label", 10), {"text": "the film", "label": "middling"}]
    write_rows(tmp_path / "new.jsonl", rows)
    message = command.refused("tune", path, "-s", "deltas=[{from: run}]", "-s", "data.train=new.jsonl",
                              "-s", f"output={tmp_path / 'new'}")
    assert "middling" in message and "new.jsonl:11" in message
    assert not (tmp_path / "new").exists()
