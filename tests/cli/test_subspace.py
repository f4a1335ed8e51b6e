"""`deltaloom subspace`: the intrinsic dimension of a toy task, cut off and gone on with; a decoder from several prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deltaloom.errors import Interrupted, RefusedError
from deltaloom.files import write_atomic
from deltaloom.jobs import intrinsic_dimension, prompt_subspace
from deltaloom.jobs.intrinsic_dimension import Search, smallest
from deltaloom.jobs.runfile import read_run_file
from tests.jobs.small import run_values, write_run

LORA = {"method": "lora", "rank": 1, "targets": ["q"]}
PROMPT = {"method": "prompt", "length": 3, "init": "random"}


@pytest.mark.parametrize("least", [1, 2, 3, 7, 16, 17, 40, 100])
@pytest.mark.parametrize("start", [1, 16, 100])
def test_the_smallest_number_that_is_enough_is_found(least: int, start: int) -> None:
    asked: list[int] = []

    def enough(number: int) -> bool:
        asked.append(number)
        return number >= least

    found = smallest(enough, start, 100, 1.0 + 1e-9)
    assert found == least and len(set(asked)) == len(asked)
    rough = smallest(lambda number: number >= least, start, 100, 1.5)
    assert least <= rough < 1.5 * least + 1
    assert smallest(lambda number: False, start, 100, 1.5) is None


@pytest.fixture(scope="module")
def search(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("d90")
    return write_run(folder, run_values("prompts", models, folder, [LORA], max_steps=2))


def test_a_dimension_is_found_from_real_runs(search, command, tmp_path):
    words = ["subspace", "d90", search, "-o", tmp_path / "d", "--start", "4", "--most", "4", "--share", "0.999"]
    found = command.json(*words)
    assert found["seeds"] == [0] and found["metric"] == "loss" and not found["higher_is_better"]
    assert found["target"] == pytest.approx(found["untuned"] - 0.999 * (found["untuned"] - found["reference"]), rel=1e-6)
    rate = found["trials"][0]["learning_rate"] / 1e-2
    assert rate == pytest.approx((found["parameters"] / 4) ** 0.5)
    assert json.loads((tmp_path / "d" / "d4-seed0" / "metrics.json").read_text())["trainable_parameters"] == 4
    assert json.loads((tmp_path / "d" / "d90.json").read_text()) == found


def test_searches_are_resumed_and_never_mixed(search, tmp_path, monkeypatch):
    """On made-up runs: the method lowers the loss from 3 to 1 + seed / 10, d numbers by d / 20 of that; one is cut off."""
    made: list[str] = []
    cut = {"d10-seed1"}

    def tune(run, *, resume, say):
        folder = Path(run.file.output)
        made.append(folder.name)
        if folder.name in cut:
            cut.clear()
            folder.mkdir(parents=True)
            raise Interrupted("here")
        share = min(1.0, run.file.deltas[0].get("dimension", 20) / 20)
        metrics = {"metrics": {"loss": 3 - share * (2 - run.file.seed / 10)}, "base_metrics": {"loss": 3.0}, "delta_bytes": 1,
                   "primary": {"name": "loss", "higher_is_better": False}, "trainable_parameters": 400}
        write_atomic(folder / "metrics.json", json.dumps(metrics))
        return metrics

    monkeypatch.setattr(intrinsic_dimension, "tune", tune)
    asked = Search(share=0.5, start=4, precision=1.01, seeds=(0, 1))
    run = read_run_file(search)
    with pytest.raises(Interrupted):
        intrinsic_dimension.intrinsic_dimension(run, tmp_path / "d", asked, say=lambda text: None)
    before = list(made)
    found = intrinsic_dimension.intrinsic_dimension(run, tmp_path / "d", asked, say=lambda text: None)
    assert found["dimension"] == 10 and found["dimension_by_seed"] == {"0": 10, "1": 10}
    assert set(made[len(before):]).isdisjoint(set(before) - {"d10-seed1"}) and len(set(made)) == len(made) - 1
    assert found["target"] == pytest.approx(3 - 0.5 * 1.95) and found["reference"] == pytest.approx(1.05)
    assert len(found["trials"]) == 2 * len({trial["dimension"] for trial in found["trials"]})
    with pytest.raises(RefusedError, match="another search"):
        intrinsic_dimension.intrinsic_dimension(run, tmp_path / "d", Search(share=0.6, start=4, seeds=(0, 1)))
    assert intrinsic_dimension.intrinsic_dimension(run, tmp_path / "d", asked, say=lambda text: None) == found
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").touch()
    with pytest.raises(RefusedError, match="no search has begun there"):
        intrinsic_dimension.intrinsic_dimension(run, tmp_path / "else", asked)


@pytest.mark.parametrize(("change", "text"), [
    (["-s", "deltas=[{method: lora},{method: bitfit}]"], "one method"), (["-s", "data.eval=null"], "judge by"),
    (["--share", "0"], "share"), (["--seeds", "a"], "numbers"), (["--seeds", "1,1"], "twice"),
    (["--precision", "1"], "precision")])
def test_what_cannot_be_searched_is_refused(change, text, search, command, tmp_path):
    assert text in command.refused("subspace", "d90", search, "-o", tmp_path / "d", *change)
    assert not (tmp_path / "d").exists()


def test_prompts_of_several_runs_make_a_decoder_for_the_next(models, command, tmp_path):
    path = write_run(tmp_path, run_values("prompts", models, tmp_path, [PROMPT], max_steps=2))
    for seed in (0, 1):
        command.json("tune", path, "-s", f"seed={seed}", "-s", f"output={tmp_path / f'r{seed}'}")
    runs = [tmp_path / f"r{seed}" for seed in (0, 1)]
    found = command.json("subspace", "learn", *runs, "-o", tmp_path / "decoder", "--numbers", "8")
    assert (found["length"], found["directions"], found["numbers"]) == (3, 2, 6)
    assert found["coordinate_bytes"] == 24 and 0 < found["explained"] <= 1 and found["decoder_bytes"] > 0
    tuned = command.json("tune", path, "-s", "deltas=[{method: intrinsic-prompt, decoder: decoder}]")
    assert tuned["trainable_parameters"] == 6
    assert command.json("eval", tmp_path / "run", "--data", tmp_path / "dev.jsonl")["metrics"]["loss"] == pytest.approx(
        tuned["metrics"]["loss"], rel=1e-5)
    assert "not empty" in command.refused("subspace", "learn", *runs, "-o", tmp_path / "decoder", code=2)
    new = tmp_path / "new"
    assert "several runs" in command.refused("subspace", "learn", runs[0], "-o", new)
    assert "at least one number" in command.refused("subspace", "learn", *runs, "-o", new, "--numbers", "2")
    assert "prompt alone" in command.refused("subspace", "learn", *runs, tmp_path / "run", "-o", new)
    assert not new.exists()


def test_prompts_that_do_not_belong_together_are_refused():
    rows = torch.zeros(3, 4)
    prompt_subspace.check_alike({"a": rows, "b": rows}, {"a": "x", "b": "x"})
    with pytest.raises(RefusedError, match="different backbones"):
        prompt_subspace.check_alike({"a": rows, "b": rows}, {"a": "x", "b": "y"})
    with pytest.raises(RefusedError, match="different sizes"):
        prompt_subspace.check_alike({"a": rows, "b": rows[:2]}, {"a": "x", "b": "x"})
    with pytest.raises(RefusedError, match="all the same"):
        prompt_subspace.directions_of(torch.ones(3, 2, 4), 2)
