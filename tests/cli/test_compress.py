"""deltaloom compress: results that load, sizes predicted, bad input refused with nothing written, complete or absent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import transformers
import yaml

from deltaloom.compress.emulator import verify
from tests.jobs.small import make_model, records, write_rows

DROP = ("--method", "drop-layers", "--keep", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models of four blocks and rows."""
    folder = tmp_path_factory.mktemp("compress")
    for kind in ("llama", "bert"):
        make_model(kind, folder / kind)
    config = transformers.LlamaConfig.from_pretrained(folder / "llama", num_hidden_layers=6)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "deep")
    transformers.AutoTokenizer.from_pretrained(folder / "llama").save_pretrained(folder / "deep")
    for name, kind in (("text", "prompt-completion"), ("class", "text-label")):
        write_rows(folder / f"{name}.train.jsonl", records(kind))
        write_rows(folder / f"{name}.dev.jsonl", records(kind, 12, seed=1))
    (folder / "empty.jsonl").write_text("")
    return folder


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_smaller_folder_that_transformers_loads(command, place, tmp_path):
    found = command.json("compress", place / "deep", "-o", tmp_path / "out", "--method", "drop-layers", "--ratio", "0.5",
                         "--data", place / "text.train.jsonl", "--eval", place / "text.dev.jsonl")
    assert {"bytes_before", "bytes_after", "metrics"} <= found.keys()
    assert found["bytes_after"] == found["predicted_bytes"] < found["bytes_before"]
    assert found["metrics"]["perplexity"] > 0 and found["base_metrics"].keys() == found["metrics"].keys()
    assert found["time"]["unit"] == "generated token" and found["time"]["speedup"] > 0
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.num_hidden_layers == 3
    record = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert record["steps"] == found["steps"] and record["files"]["model.safetensors"]["sha256"]
    assert leftovers(tmp_path) == ["out"]
    text = "".join(path.read_text() for path in (tmp_path / "out").glob("*.md")) + (tmp_path / "out/report.html").read_text()
    assert str(place) not in text and "good film" not in json.dumps(record)
    evaluated = command.json("eval", tmp_path / "out", "--task", "causal-lm", "--data", place / "text.dev.jsonl")
    assert evaluated["metrics"]["loss"] == pytest.approx(found["metrics"]["loss"], rel=1e-4)


def test_the_emulator_from_flags_and_its_proof(command, place, tmp_path):
    found = command.json("compress", "--method", "emulator", "--keep-first", "2", "--keep-last=1", "--middle", "1",
                         place / "deep", "-o", tmp_path / "out", "--distil", place / "text.train.jsonl", "-s",
                         "data.max_length=64")
    assert [step["step"]["method"] for step in found["steps"]] == ["emulator", "distil"]
    hashes = found["steps"][0]["facts"]["hashes"]
    load = transformers.AutoModelForCausalLM.from_pretrained
    verify(load(tmp_path / "out"), hashes)
    verify(load(place / "deep"), hashes, original=True)
    assert load(tmp_path / "out").config.num_hidden_layers == 4


def test_a_backbone_without_a_head_stays_one(command, place, tmp_path):
    found = command.json("compress", place / "bert", "-o", tmp_path / "out", *DROP, "--task", "sequence-classification",
                         "--data", place / "class.train.jsonl", "-s", "data.max_length=64")
    assert found["metrics"] == {} and any("no held-out rows" in note for note in found["notes"])
    model, info = transformers.BertModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and model.config.num_hidden_layers == 1


@pytest.mark.parametrize("steps", [
    [{"method": "drop-layers", "keep": 3, "choose": "cluster"}, {"method": "quantise", "codec": "int8"}],
    [{"method": "whitened-svd", "ratio": 0.6}, {"method": "heal", "train": {"max_steps": 2}}],
    [{"method": "emulator", "middle": [{"method": "svd", "ratio": 0.5}]}],
], ids=["drop-int8", "svd-heal", "emulator-svd"])
def test_a_list_of_steps_weighs_what_the_plan_says(command, place, tmp_path, steps):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": str(place / "deep"), "data": {"train": str(place / "text.train.jsonl")},
                                    "compress": steps, "output": str(tmp_path / "out")}))
    planned = command.json("compress", path, "--plan")
    assert not (tmp_path / "out").exists() and planned["exact"]
    found = command.json("compress", path)
    assert planned["bytes_after"] == found["bytes_after"] and planned["parameters_after"] == found["parameters_after"]
    assert planned["bytes_before"] == found["bytes_before"]
    assert [step["bytes"] for step in planned["steps"]] == [step["bytes"] for step in found["steps"]]


BAD = [
    ((), ["no method is given"]),
    (("--method", "drop-layer"), ["Did you mean 'drop-layers'?"]),
    (("--method", "drop-layers", "--keeep", "1"), ["keeep", "Did you mean 'keep'?"]),
    (("--method", "drop-layers", "--keep", "9", "--choose", "uniform"), ["cannot keep that many"]),
    (("--method", "drop-layers", "--ratio", "1.5"), ["ratio", "less than 1"]),
    (("--method", "drop-layers", "--keep", "1"), ["needs rows", "--data FILE"]),
    (("--method", "drop-layers", "--keep", "1", "--data", "empty.jsonl"), ["empty.jsonl is empty"]),
    (("--method", "drop-layers", "--keep", "1", "--data", "nowhere.jsonl"), ["nowhere.jsonl"]),
    (("--method", "emulator", "--middle", "1", "--keep-first", "9"), ["no block between"]),
    (("--method", "svd", "--ratio", "0.0001"), ["ratio"]),
    (("--method", "svd", "--ratio", "0.5", "-s", "ratio=0.4"), ["given twice"]),
    (("--method", "prune-heads", "--share", "0.5", "--task", "seq2seq-lm", "--data", "text.train.jsonl"), ["seq2seq-lm"]),
]


@pytest.mark.parametrize(("arguments", "said"), BAD, ids=[" ".join(each[0])[:50] or "nothing" for each in BAD])
def test_bad_input_is_refused_and_nothing_is_written(command, place, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(place)
    monkeypatch.setattr("deltaloom.jobs.compress.load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    message = command.refused("compress", "deep", "-o", tmp_path / "out", *arguments)
    for text in said:
        assert text in message
    assert leftovers(tmp_path) == []


def test_what_stands_in_the_output_stays(command, place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    message = command.refused("compress", place / "deep", "-o", tmp_path / "out", *DROP, "--choose", "uniform")
    assert "not empty" in message and (tmp_path / "out" / "mine.txt").read_text() == "mine"
    assert "no output folder" in command.refused("compress", place / "deep", *DROP, "--choose", "uniform")


def test_a_compressed_model_is_not_compressed_again(command, place, tmp_path):
    command.json("compress", place / "deep", "-o", tmp_path / "int8", "--method", "quantise", "--codec", "int8")
    for method in (("quantise",), ("drop-layers", "--keep", "1", "--choose", "uniform")):
        message = command.refused("compress", tmp_path / "int8", "-o", tmp_path / "out", "--method", *method)
        assert "already" in message and "one list" in message
    assert leftovers(tmp_path) == ["int8"]


def test_a_run_file_of_training_with_steps_says_what_to_do(command, place, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": str(place / "deep"), "task": "causal-lm", "compress": [{"method": "magnitude"}],
                                    "data": {"train": "x.jsonl"}, "deltas": [{"method": "lora"}]}))
    message = command.refused("tune", path)
    assert "deltaloom compress RUN.yaml" in message and "model: DIR" in message
    assert "deltas" in command.refused("compress", path)
    assert "a run file says itself" in command.refused("compress", path, "--keep", "3")


def test_what_leads_comes_first(command, place, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": str(place / "deep"), "output": str(tmp_path / "out"), "compress": [
        {"method": "magnitude"}, {"method": "emulator", "middle": 1}]}))
    assert "has to be the first step" in command.refused("compress", path)


def test_a_step_that_breaks_a_promise_leaves_nothing(command, place, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": str(place / "deep"), "output": str(tmp_path / "out"), "compress": [
        {"method": "emulator", "middle": 1}, {"method": "magnitude"}]}))
    assert "bit for bit" in command.refused("compress", path)
    assert leftovers(tmp_path) == ["run.yaml"]


@pytest.mark.parametrize("where", ["compression_page", "write_model", "side_by_side"])
def test_a_killed_compression_leaves_no_folder_that_looks_finished(place, tmp_path, where):
    code = ("import os, signal, deltaloom.jobs.compress as job;"
            f"job.{where} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL);"
            f"from deltaloom.cli.main import main; main(['compress', {str(place / 'deep')!r}, '-o', {str(tmp_path / 'out')!r},"
            "'--method', 'drop-layers', '--keep', '1', '--choose', 'uniform'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())


def test_held_out_rows_that_are_calibration_rows_are_told(command, place, tmp_path):
    rows = place / "text.train.jsonl"
    found = command.json("compress", place / "deep", "-o", tmp_path / "out", *DROP, "--data", rows, "--eval", rows)
    assert any("flatters" in note for note in found["notes"])
