"""Every command on small runs: the keys that --json promises, what is written, and that the numbers agree."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
import yaml

from deltaloom.jobs.opening import open_source
from deltaloom.registry import names_in
from tests.jobs.small import Command, make_model, records, run_values, write_rows, write_run

METHODS = names_in("deltaloom.deltas")  # a new method changes no test of another part


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):
    """Folders of finished runs: two of classes, two of a language model."""
    patch = pytest.MonkeyPatch()
    folders = {}
    for name, kind, deltas, seed in (("a", "classes", [{"method": "lora", "rank": 2}], 0),
                                     ("b", "classes", [{"method": "lora", "rank": 3}, {"method": "prefix", "length": 2}], 1),
                                     ("c", "prompts", [{"method": "lora", "rank": 2}], 0),
                                     ("d", "prompts", [{"method": "dora", "rank": 2}], 1)):
        folder = tmp_path_factory.mktemp(name)
        values = run_values(kind, models, folder, deltas, learning_rate=3e-2) | {"seed": seed}
        Command(patch).json("tune", write_run(folder, values))
        folders[name] = folder / "run"
    patch.undo()
    return folders


def test_eval_gives_the_numbers_of_the_run(runs, command):
    for name in ("a", "c"):
        stored = json.loads((runs[name] / "metrics.json").read_text())
        found = command.json("eval", runs[name], "--data", runs[name].parent / "dev.jsonl")
        assert set(found) >= {"metrics", "rows"}
        assert found["rows"] == 12
        # another process may sum in another order; the values are those of the run
        assert found["metrics"] == pytest.approx(stored["metrics"], rel=1e-5)
        assert found["intervals"] == {key: pytest.approx(value, rel=1e-5) for key, value in stored["intervals"].items()}
    classes = command.json("eval", runs["a"], "--data", runs["a"].parent / "dev.jsonl")["per_class"]
    assert {row["label"]: row["support"] for row in classes} == {"good": 6, "bad": 6}


def test_eval_of_a_delta_folder_reads_rows_as_the_run_did(runs, command):
    whole = command.json("eval", runs["a"], "--data", runs["a"].parent / "dev.jsonl")
    assert command.json("eval", runs["a"] / "delta", "--data", runs["a"].parent / "dev.jsonl") == whole
    assert open_source(str(runs["a"] / "delta")).task.settings.max_length == 64


def test_eval_of_a_bare_language_model_and_with_a_delta(runs, models, command):
    rows = runs["c"].parent / "dev.jsonl"
    bare = command.json("eval", models["llama"], "--task", "causal-lm", "--data", rows)  # precision auto: bf16 on some machines
    tuned = command.json("eval", models["llama"], "--delta", runs["c"], "--data", rows)
    stored = json.loads((runs["c"] / "metrics.json").read_text())
    assert bare["metrics"]["loss"] == pytest.approx(stored["base_metrics"]["loss"], rel=1e-3)
    assert tuned["metrics"]["loss"] == pytest.approx(stored["metrics"]["loss"], rel=1e-5)


@pytest.mark.parametrize(("run", "key"), [("a", "label"), ("c", "text")])
def test_predict_writes_a_line_for_each_row_without_targets(run, key, runs, tmp_path, command):
    rows = [{name: value for name, value in row.items() if name in ("text", "prompt")}
            for row in records("text-label" if run == "a" else "prompt-completion", 5, seed=3)]
    out = tmp_path / "out.jsonl"
    done = command.json("predict", runs[run], "--data", write_rows(tmp_path / "new.jsonl", rows), "-o", out,
                        *(["--max-new-tokens", 4] if run == "c" else []))
    assert done["rows"] == 5
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["where"] for line in lines] == [f"{tmp_path / 'new.jsonl'}:{number}" for number in range(1, 6)]
    assert all(isinstance(line[key], str) for line in lines)
    assert "--overwrite" in command.refused("predict", runs[run], "--data", tmp_path / "new.jsonl", "-o", out)


def test_inspect_tells_what_the_run_saved(runs, command):
    stored = json.loads((runs["b"] / "metrics.json").read_text())
    found = command.json("inspect", runs["b"])
    assert found["parameters"] == stored["final_parameters"] + stored["head_parameters"]
    assert found["bytes"] == stored["delta_bytes"]
    assert [method["method"] for method in found["methods"] if not method["head"]] == ["lora", "prefix"]
    assert found["rank"] == 3 and found["labels"] == ["bad", "good"]
    assert sum(part["parameters"] for part in (*found["sites"], *found["shared"])) == found["parameters"]
    assert all(group["ranks"] == [3] * group["layers"] and 1 / group["layers"] <= group["rho"] <= 1 for group in found["groups"])
    assert {group["role"] for group in found["groups"]} >= {"q", "k", "v", "o"}
    assert command.json("inspect", runs["a"] / "delta" / "peft")["format"] == "peft"


def test_inspect_needs_no_torch(runs):
    code = ("import sys; from pathlib import Path; from deltaloom.jobs.inspect import inspect\n"
            f"inspect(Path({str(runs['a'])!r}), say=lambda text: None)\n"
            f"inspect(Path({str(runs['a'] / 'delta' / 'peft')!r}), say=lambda text: None)\n"
            "print([name for name in ('torch', 'transformers') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("run", ["a", "c", "d"])
def test_merge_gives_a_plain_model_that_computes_the_same(run, runs, tmp_path, command):
    found = command.json("merge", runs[run], "-o", tmp_path / "merged")
    assert set(found) >= {"max_error", "relative_error", "logits_max_error"}
    assert found["logits_max_error"] < 1e-4
    auto = transformers.AutoModelForSequenceClassification if run == "a" else transformers.AutoModelForCausalLM
    merged = auto.from_pretrained(tmp_path / "merged").eval()
    tuned = open_source(str(runs[run]), dtype="fp32").model.eval()
    ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, tuned(input_ids=ids).logits, atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")("the film").input_ids
    if run == "a":
        assert merged.config.id2label == {0: "bad", 1: "good"}


def test_merge_refuses_what_cannot_be_folded_and_writes_nothing(runs, tmp_path, command):
    assert "prefix" in command.refused("merge", runs["b"], "-o", tmp_path / "merged").lower()
    assert not (tmp_path / "merged").exists()


def test_convert_to_every_format_and_back(runs, tmp_path, command):
    rows = runs["c"].parent / "dev.jsonl"
    expected = command.json("eval", runs["c"], "--data", rows)["metrics"]
    for to in ("peft", "lora", "native"):
        found = command.json("convert", runs["c"], "--to", to, "-o", tmp_path / to)
        assert found["relative_error"] < 1e-5
        again = command.json("eval", tmp_path / to, "--data", rows)["metrics"]
        assert again == pytest.approx(expected, rel=2e-3), to  # no run file says a precision: bf16 on some machines
    back = command.json("convert", tmp_path / "peft", "--to", "native", "-o", tmp_path / "back")
    assert back["relative_error"] == 0
    assert command.json("eval", tmp_path / "back", "--data", rows)["metrics"] == pytest.approx(expected, rel=2e-3)
    near = command.json("convert", runs["c"], "--to", "lora", "--error", 0.5, "-o", tmp_path / "near")
    assert 0 < near["relative_error"] <= 0.5
    cut = command.json("convert", runs["c"], "--to", "lora", "--rank", 1, "-o", tmp_path / "cut")
    assert 0 < cut["relative_error"] < 1
    assert command.json("merge", tmp_path / "peft", "-o", tmp_path / "merged")["logits_max_error"] < 1e-4


def test_combine_is_the_weighted_sum(runs, models, tmp_path, command):
    values = run_values("prompts", models, tmp_path, [{"method": "lora", "rank": 2}], learning_rate=3e-2) | {"seed": 5}
    command.json("tune", write_run(tmp_path, values))
    sources = [runs["c"], tmp_path / "run"]
    found = command.json("combine", *sources, "--weights", "0.25,0.75", "-o", tmp_path / "sum")
    assert found["relative_error"] < 1e-5 and found["weights"] == [0.25, 0.75]
    ends = []
    for source in [*sources, tmp_path / "sum"]:
        opened = open_source(str(source), dtype="fp32")
        before = {name: p.clone() for name, p in opened.tuned.detach().named_parameters()}
        opened = open_source(str(source), dtype="fp32")
        opened.tuned.merge()
        with opened.tuned.bare() as plain:
            ends.append({name: (p.detach() - before[name].detach()).numpy() for name, p in plain.named_parameters()})
    for name, change in ends[2].items():
        assert np.allclose(0.25 * ends[0][name] + 0.75 * ends[1][name], change, atol=1e-6), name


def test_compare_and_report_write_a_page_of_several_runs(runs, tmp_path, command):
    found = command.json("compare", runs["a"], runs["b"], "-o", tmp_path / "compared.html")
    assert found["path"] == str(tmp_path / "compared.html")
    assert "lora" in command("compare", runs["a"], runs["b"]).err
    path = command.json("report", runs["a"], runs["b"], "-o", tmp_path / "r.html")["path"]
    assert path == str(tmp_path / "r.html") and "<svg" in (tmp_path / "r.html").read_text()


def test_plan_is_what_tune_then_has(runs, command):
    run_file = runs["b"].parent / "run.yaml"
    before = sorted(path.name for path in runs["b"].parent.iterdir())
    found = command.json("plan", run_file)
    assert set(found) >= {"sites", "trainable_parameters", "delta_bytes", "flops_per_token", "memory_bytes", "seconds"}
    stored = json.loads((runs["b"] / "metrics.json").read_text())
    same = ("trainable_parameters", "head_parameters", "total_parameters", "flops_per_token")
    assert {key: found[key] for key in same} == {key: stored[key] for key in same}
    assert sum(row["parameters"] for row in found["sites"]) == found["trainable_parameters"] + found["head_parameters"]
    assert sorted(path.name for path in runs["b"].parent.iterdir()) == before
    assert ">>" in command("plan", runs["c"].parent / "run.yaml").err
    assert found["fits"] and 0 < found["seconds"] < 60 and 0 < found["memory_bytes"] < 1e9


def test_a_run_that_does_not_fit_into_memory_is_planned_and_refused(runs, command, monkeypatch):
    run_file = runs["b"].parent / "run.yaml"
    kept = sorted(path.relative_to(runs["b"]) for path in runs["b"].rglob("*"))
    monkeypatch.setattr("deltaloom.jobs.budget.free_bytes", lambda device: 1000)
    found = command.json("plan", run_file)
    assert not found["fits"] and found["memory_bytes"] > 1000 and "gradient_checkpointing" in found["warnings"][-1]
    refused = command("tune", run_file, "--overwrite")
    assert refused.code == 3 and "besides the model" in refused.err and "max_length" in refused.err
    assert sorted(path.relative_to(runs["b"]) for path in runs["b"].rglob("*")) == kept


def test_methods_and_models_and_doctor(command):
    assert [method["name"] for method in command.json("methods")["methods"]] == METHODS
    settings = {setting["name"]: setting for setting in command.json("methods", "lora")["methods"][0]["settings"]}
    assert settings["rank"]["default"] == "8" and settings["targets"]["default"] == "'all-linear'"
    assert "lora" in command.refused("methods", "lorra")
    assert {model["name"] for model in command.json("models", "list")["models"]} == {
        "bundled:minilm", "bundled:smollm2-135m-instruct"}
    found = command.json("doctor")
    assert found["facts"]["torch"] and isinstance(found["problems"], list)


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "regression", "causal-lm", "seq2seq-lm",
                                  "image-classification"])
def test_init_writes_a_file_that_plans(task, models, tmp_path, command, monkeypatch):
    kinds = {"sequence-classification": ("bert", "text-label"), "token-classification": ("bert", "tokens"),
             "regression": ("bert", "regression"), "causal-lm": ("llama", "messages"),
             "seq2seq-lm": ("t5", "prompt-completion"), "image-classification": ("vit", None)}
    model, rows = kinds[task]
    if rows is None:
        assert "--model" in command.refused("init", tmp_path / "run.yaml", "--task", task)
        assert list(tmp_path.iterdir()) == []
        return
    write_rows(tmp_path / "my rows: all.jsonl", records(rows))
    path = command.json("init", tmp_path / "run.yaml", "--task", task, "--model", models[model],
                        "--train", "my rows: all.jsonl")["path"]
    assert command.json("plan", path, "-s", "data.max_length=64" if model == "bert" else "seed=1")["trainable_parameters"] > 0
    assert "--overwrite" in command.refused("init", path, "--task", task)
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["task"] == task


def test_chat_answers_switches_and_ends(runs, command):
    done = command("chat", runs["c"], "--max-new-tokens", 3, stdin="the film\n/base\nthe film\n/new\n\n")
    assert done.code == 0, done.err
    assert "The bare model answers." in done.out


def test_help_of_every_command_has_an_example(command):
    for name in ("tune", "plan", "eval", "predict", "chat", "inspect", "merge", "convert", "combine", "compare", "report",
                 "methods", "doctor", "init"):
        done = command(name, "--help")
        assert done.code == 0 and "Example:" in done.out, name


def test_a_resolved_run_file_makes_the_same_run_again(models, tmp_path, command, monkeypatch):
    make_model("bert", tmp_path / "near" / "bert")
    values = run_values("classes", models, tmp_path, [{"method": "lora", "rank": 2}]) | {"model": "near/bert"}
    first = command.json("tune", write_run(tmp_path, values))
    monkeypatch.chdir(tmp_path / "near")
    again = command.json("tune", tmp_path / "run" / "run.yaml", "-s", f"output={tmp_path / 'again'}")
    assert again["metrics"] == first["metrics"]
    assert (tmp_path / "again/delta/delta.safetensors").read_bytes() == (tmp_path / "run/delta/delta.safetensors").read_bytes()
