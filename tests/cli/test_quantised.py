"""Runs on a quantised base: what each command makes of them, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from deltaloom.checkpoint.record import read_record
from deltaloom.compact.face import compact_layers
from deltaloom.jobs.runfile import read_run_file
from deltaloom.jobs.tune import tune
from deltaloom.models.compact import form_of
from tests.cli.test_resume import interrupting, tensors
from tests.jobs.small import Command, run_values, write_run

LORA = {"method": "lora", "rank": 2}


def quantised(values, codec="nf4"):
    return values | {"base": {"quantise": codec}}


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """A finished run of a language model on NF4."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("nf4")
    values = quantised(run_values("prompts", models, folder, [LORA], learning_rate=3e-2))
    metrics = Command(patch).json("tune", write_run(folder, values))
    patch.undo()
    return folder / "run", metrics


def test_the_run_says_how_its_base_was_stored(run, models):
    folder, metrics = run
    assert yaml.safe_load((folder / "run.yaml").read_text())["base"] == {"quantise": "nf4"}
    record = read_record(folder / "delta").base
    assert (record.quantise, record.quantised) == ("nf4", "nf4")
    dense = AutoModelForCausalLM.from_pretrained(models["llama"])
    assert metrics["total_parameters"] == sum(p.numel() for p in dense.parameters())
    assert (folder / "delta" / "peft" / "adapter_config.json").is_file()
    assert 'quantise="nf4"' in (folder / "README.md").read_text()
    assert metrics["metrics"]["loss"] < metrics["base_metrics"]["loss"]


def test_eval_loads_the_base_as_in_training(run, command):
    folder, metrics = run
    found = command.json("eval", folder, "--data", folder.parent / "dev.jsonl")
    assert found["metrics"] == pytest.approx(metrics["metrics"], rel=1e-5)
    found = command.json("eval", folder / "delta", "--data", folder.parent / "dev.jsonl")
    assert found["metrics"] == pytest.approx(metrics["metrics"], rel=1e-5)
    out = folder.parent / "out.jsonl"
    assert command.json("predict", folder, "--data", folder.parent / "dev.jsonl", "-o", out, "--max-new-tokens", 2)["rows"] == 12


def test_merging_makes_a_dense_model(run, tmp_path, command):
    folder, metrics = run
    found = command.json("merge", folder, "-o", tmp_path / "dense")
    assert found["relative_error"] < 1e-6 and found["logits_max_error"] < 1e-3
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not compact_layers(model) and type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    again = command.json("eval", tmp_path / "dense", "--task", "causal-lm", "--data", folder.parent / "dev.jsonl",
                         "-s", "data.max_length=128")
    assert again["metrics"]["loss"] == pytest.approx(metrics["metrics"]["loss"], rel=2e-2)  # precision auto may be bf16


def test_merging_with_requantise_keeps_the_form_and_says_the_error(run, tmp_path, command):
    folder, _ = run
    found = command.json("merge", folder, "-o", tmp_path / "nf4", "--requantise")
    assert 0.01 < found["relative_error"] < 0.2 and found["logits_max_error"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    assert form_of(model) == "nf4" and len(compact_layers(model)) == 14
    command.json("eval", tmp_path / "nf4", "--task", "causal-lm", "--data", folder.parent / "dev.jsonl")
    rows = write_run(tmp_path, quantised(yaml.safe_load((folder.parent / "run.yaml").read_text())
                                         | {"model": str(tmp_path / "nf4"), "output": str(tmp_path / "again")}))
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text((folder.parent / f"{name}.jsonl").read_text())
    assert "already" in command.refused("tune", rows)
    assert not (tmp_path / "again").exists()
    plain = command.json("tune", rows, "-s", "base.quantise=null")
    assert plain["metrics"]
    record = read_record(tmp_path / "again" / "delta").base
    assert (record.quantise, record.quantised) == (None, "nf4")
    command.json("eval", tmp_path / "again", "--data", folder.parent / "dev.jsonl")


def test_requantising_needs_a_quantised_base(models, tmp_path, command):
    command.json("tune", write_run(tmp_path, run_values("prompts", models, tmp_path, [LORA])))
    assert "dense" in command.refused("merge", tmp_path / "run", "-o", tmp_path / "m", "--requantise")
    assert not (tmp_path / "m").exists()


def test_a_resumed_run_is_the_uninterrupted_one(models, tmp_path, command):
    values = quantised(run_values("prompts", models, tmp_path, [LORA], max_steps=6, save_every=2), "int8")
    path = write_run(tmp_path, values)
    command.json("tune", path)
    with pytest.raises(BaseException, match="interrupted"):
        tune(read_run_file(path, [f"output={tmp_path / 'cut'}"]), say=lambda text: None, sinks=[interrupting(3)])
    assert "nf4" in command.refused("tune", path, "--resume", "-s", f"output={tmp_path / 'cut'}", "-s", "base.quantise=nf4")
    command.json("tune", path, "-s", f"output={tmp_path / 'cut'}", "--resume")
    assert tensors(tmp_path / "cut") == tensors(tmp_path / "run")


@pytest.mark.parametrize(("kind", "codec"), [("classes", "nf4"), ("pairs", "int8")])
def test_other_tasks(kind, codec, models, tmp_path, command):
    metrics = command.json("tune", write_run(tmp_path, quantised(run_values(kind, models, tmp_path, [LORA]), codec)))
    found = command.json("eval", tmp_path / "run", "--data", tmp_path / "dev.jsonl")
    assert found["metrics"] == pytest.approx(metrics["metrics"], rel=1e-4)


def test_plan_counts_what_the_base_takes(models, tmp_path, command):
    path = write_run(tmp_path, run_values("prompts", models, tmp_path, [LORA]))
    dense = command.json("plan", path)
    small = command.json("plan", path, "-s", "base.quantise=int8")
    assert small["total_parameters"] == dense["total_parameters"] and small["model_bytes"] < dense["model_bytes"]
    assert small["trainable_parameters"] == dense["trainable_parameters"]


def test_going_on_from_a_delta_on_the_dense_base_is_told(run, tmp_path, command):
    folder, _ = run
    values = yaml.safe_load((folder / "run.yaml").read_text())
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text((folder.parent / f"{name}.jsonl").read_text())
    values |= {"deltas": [{"from": str(folder)}], "base": {}, "output": str(tmp_path / "on"),
               "data": {"train": "train.jsonl", "eval": "dev.jsonl", "max_length": 128}}
    values.pop("origins")
    done = command("plan", write_run(tmp_path, values))
    assert done.code == 0 and "trained on the base stored as nf4" in done.err


@pytest.mark.parametrize(("change", "words"), [
    ("base.quantise=nf5", ["base", "nf5", "nf4"]), ("base.quantise=8", ["base", "quantise"]),
    ("base.quantize=nf4", ["quantize", "quantise"]),
    ("base=nf4", ["base"]), ("deltas.0.method=qlora", ["quantise: nf4"]), ("deltas.0.method=qdora", ["quantise: nf4"])])
def test_bad_settings(change, words, models, tmp_path, command):
    path = write_run(tmp_path, run_values("prompts", models, tmp_path, [LORA]))
    text = command.refused("tune", path, "-s", change)
    assert all(word in text for word in words), text
    assert not (tmp_path / "run").exists()
