"""`plan --advise`: what it proposes plans and tunes; nothing is written unless asked; what is wrong is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from deltaloom.jobs import advise as job
from deltaloom.models.precision import Precision
from tests.jobs.small import files_of, records, run_values, write_rows, write_run


@pytest.fixture
def bare(models, tmp_path):
    """A run file that leaves out whatever can be left out, and its folder."""
    values = run_values("classes", models, tmp_path, [])
    return write_run(tmp_path, {"model": values["model"], "task": values["task"], "data": {"train": "train.jsonl"},
                                "output": values["output"]})


def by_setting(found):
    return {each["setting"]: each for each in found["advice"]}


@pytest.mark.parametrize("kind", ["classes", "numbers", "tags", "prompts", "chats", "pairs"])
def test_what_is_advised_plans_and_tunes(kind, models, tmp_path, command):
    values = run_values(kind, models, tmp_path, [])
    start = write_run(tmp_path, {key: values[key] for key in ("model", "task", "output")} | {"data": {"train": "train.jsonl"}})
    before = files_of(tmp_path)
    found = command.json("plan", start, "--advise")
    assert files_of(tmp_path) == before and found["path"] is None
    advice = by_setting(found)
    assert {"deltas", "train.learning_rate", "data.eval_fraction", "train.epochs"} <= set(advice)
    for each in found["advice"]:
        assert set(each) == {"setting", "value", "present", "reason", "evidence"} and each["present"] is None

    again = command.json("plan", start, "--advise", "-o", tmp_path / "advised.yaml")
    assert again["advice"] == found["advice"] and again["path"] == str(tmp_path / "advised.yaml")
    planned = command.json("plan", tmp_path / "advised.yaml")
    same = ("sites", "trainable_parameters", "head_parameters", "delta_bytes", "flops_per_token", "tokens", "fits")
    assert {key: planned[key] for key in same} == {key: again[key] for key in same}
    assert command.json("plan", tmp_path / "advised.yaml", "--advise")["advice"] == []  # what is followed is not advised again

    done = command.json("tune", tmp_path / "advised.yaml", "-s", "train.epochs=1")
    assert done["trainable_parameters"] == planned["trainable_parameters"]
    resolved = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert resolved["train"]["learning_rate"] == advice["train.learning_rate"]["value"]


def test_the_table_and_the_comments_have_the_reasons(bare, command):
    done = command("plan", bare, "--advise", "-o", bare.parent / "advised.yaml")
    assert done.code == 0 and done.out == ""
    for words in ("Advice", "setting", "evidence", "train.learning_rate", "docs/results/adaptive.md", "Wrote"):
        assert words in done.err
    text = (bare.parent / "advised.yaml").read_text()
    assert "# deltas: " in text and "[docs/results/adaptive.md]" in text
    assert yaml.safe_load(text)["deltas"][0]["rank"] == 1


@pytest.mark.parametrize("share", ["1.2%", "5%", "20%", "300"])
@pytest.mark.parametrize("kind", ["classes", "prompts"])
def test_a_budget_is_kept(kind, share, models, tmp_path, command):
    values = run_values(kind, models, tmp_path, [])
    start = write_run(tmp_path, {key: values[key] for key in ("model", "task", "data", "output")})
    found = command.json("plan", start, "--advise", "--budget", share, "-o", tmp_path / "advised.yaml")
    most = float(share[:-1]) / 100 * found["total_parameters"] if share.endswith("%") else int(share)
    assert 0 < found["trainable_parameters"] <= most
    assert yaml.safe_load((tmp_path / "advised.yaml").read_text())["budget"] == {"parameters": share}
    assert command.json("tune", tmp_path / "advised.yaml", "-s", "train.epochs=1")["final_parameters"] <= most


def test_a_budget_of_time_and_a_merge(models, tmp_path, command):
    stated = [{"method": "prefix", "length": 2}]
    start = write_run(tmp_path, run_values("classes", models, tmp_path, stated) | {"train": {"precision": "fp32"}})
    found = command.json("plan", start, "--advise", "--budget", "2s", "--merge", "-o", tmp_path / "advised.yaml")
    advice = by_setting(found)["deltas"]
    assert advice["present"] == stated and "changes no weight" in advice["reason"]
    advised = yaml.safe_load((tmp_path / "advised.yaml").read_text())
    assert advised["train"]["max_time"] == "2s"
    command.json("tune", tmp_path / "advised.yaml")
    command.json("merge", tmp_path / "run", "-o", tmp_path / "merged")
    assert "deltas" not in by_setting(command.json("plan", start, "--advise"))  # nobody asked for a merge


def test_leaks_and_repeated_rows_are_counted(models, tmp_path, command):
    values = run_values("classes", models, tmp_path, [])
    rows = records("text-label", 40)
    unlike = {row["text"] for row in rows}
    write_rows(tmp_path / "train.jsonl", [*rows, *rows[:7]])
    others = [row for row in records("text-label", 12, seed=1) if row["text"] not in unlike]
    write_rows(tmp_path / "dev.jsonl", [*rows[:3], *others])
    advice = by_setting(command.json("plan", write_run(tmp_path, values), "--advise"))
    assert "3 of" in advice["data.eval"]["reason"] and advice["data.eval"]["value"] is None
    assert f"{7 + 40 - len({(row['text'], row['label']) for row in rows})} of 47" in advice["data.train"]["reason"]


def test_relative_paths_hold_in_another_folder(bare, command, models, tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(models["bert"])
    start = write_run(tmp_path, yaml.safe_load(bare.read_text()) | {"model": "model"})
    (tmp_path / "deep" / "er").mkdir(parents=True)
    found = command.json("plan", start, "--advise", "-o", tmp_path / "deep" / "er" / "advised.yaml")
    advised = yaml.safe_load((tmp_path / "deep" / "er" / "advised.yaml").read_text())
    assert advised["data"]["train"] == "../../train.jsonl" and advised["model"] == "../../model"
    monkeypatch.chdir(tmp_path / "deep")
    assert command.json("plan", "er/advised.yaml")["sites"] == found["sites"]


def test_little_memory_makes_the_model_smaller_and_computes_again(bare, command, monkeypatch):
    dense = command.json("plan", bare, "--advise")
    kilobytes = dense["model_bytes"] / 1000
    tight = by_setting(command.json("plan", bare, "--advise", "--budget", f"{kilobytes * 1.1:.3f}kB"))
    assert tight["base.quantise"]["value"] == "int8" and tight["train.gradient_checkpointing"]["value"] is True
    assert "2.4226" in tight["base.quantise"]["reason"]
    roomy = by_setting(command.json("plan", bare, "--advise", "--budget", "4GB"))
    assert "base.quantise" not in roomy and "train.gradient_checkpointing" not in roomy
    monkeypatch.setattr("deltaloom.jobs.budget.free_bytes", lambda device: 2000)
    assert "smaller model" in command.refused("plan", bare, "--advise", "-o", bare.parent / "advised.yaml", code=3)
    assert not (bare.parent / "advised.yaml").exists()


def test_fp32_that_does_not_fit_may_be_bf16(bare, command, monkeypatch):
    monkeypatch.setattr(job, "auto_precision", lambda: Precision(torch.bfloat16, "made up"))
    plain = command.json("plan", bare, "-s", "train.precision=fp32", "-s", "deltas=[{method: bitfit}]")
    size = f"{plain['model_bytes'] / 1000:.3f}kB"
    found = by_setting(command.json("plan", bare, "--advise", "-s", "train.precision=fp32", "--budget", size))
    assert found["train.precision"]["value"] == "bf16" and "base.quantise" not in found


@pytest.mark.parametrize(("arguments", "says"), [
    (["--budget", "1%", "--budget", "2%"], "contradictory"), (["--budget", "lots"], "this is no budget"),
    (["--budget", "3"], "too small for any method"), (["--budget", "0%"], "budget"),
    (["-s", "budget.parameters=1%", "--budget", "2%"], "contradictory"), (["-s", "train.learning_rte=1"], "learning_rate"),
    (["-s", "data.max_length=3"], "max_length"), (["-s", "data.train=none.jsonl"], "none.jsonl"),
    (["-s", "deltas=[{method: lorra}]"], "Did you mean 'lora'"), (["-s", "task=null"], "task is missing")])
def test_what_is_wrong_is_refused_and_nothing_is_written(arguments, says, bare, command):
    before = files_of(bare.parent)
    assert says in command.refused("plan", bare, "--advise", "-o", bare.parent / "advised.yaml", *arguments)
    assert files_of(bare.parent) == before


def test_no_rows(bare, command):
    (bare.parent / "train.jsonl").write_text("")
    assert "train.jsonl" in command.refused("plan", bare, "--advise")


def test_a_file_is_not_written_over_and_options_belong_to_advice(bare, command):
    taken = bare.parent / "taken.yaml"
    taken.write_text("mine")
    assert "exists" in command.refused("plan", bare, "--advise", "-o", taken)
    assert "exists" in command.refused("plan", bare, "--advise", "-o", bare)
    assert taken.read_text() == "mine"
    for option in (["--budget", "1%"], ["--merge"], ["-o", "x.yaml"]):
        assert "--advise" in command.refused("plan", bare, *option)
    assert "deltas" in command.refused("plan", bare)  # without --advise a run file has to name its method


def test_advice_says_what_it_stands_for(bare, command):
    page = Path(__file__).parents[2] / "docs" / "advice.md"
    text = page.read_text(encoding="utf-8")
    for each in command.json("plan", bare, "--advise")["advice"]:
        assert f"`{each['setting']}`" in text
