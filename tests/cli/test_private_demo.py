"""The demo with a toy model: the same processes, bars, table and page; and its page alone."""

import json
import re

import pytest
import yaml

from deltaloom.errors import SettingsError
from deltaloom.jobs.private_demo import demo_settings
from deltaloom.report.private import demo_page, demo_text
from tests.cli.private_flow import ROOT, run_file, toy_model

BARS = ["base", "emulator", "emulator_tuned", "plugged_in", "split_tuned", "central_front", "central"]
LINE = {"case": "none", "attack": "probe-table", "knows": "with the prefix", "tokens": 40, "top1": 0.9, "top5": 1.0, "texts": 0.5,
        "canaries": None, "majority": 0.1}
FOUND = {"bars": {name: {"loss": 2.0 - index / 8, "perplexity": 7.0} for index, name in enumerate(BARS)},
         "parties": {"a": {"rows": 3, "rounds": 2, "samples": 6, "up": 1234567, "down": 10}},
         "leakage": {"table": [LINE], "verdicts": [{"case": "none", "protective": False, "reason": "<b>too much</b>"}]},
         "seconds": 75.0, "model": "toy", "cut": 1, "blocks": 4, "held_out": 6}


def assert_self_contained(page: str) -> None:
    assert "<script" not in page and not re.search(r'(?:src|href)="(?!#)', page) and "default-src &#39;none&#39;" in page


def test_text_and_page_show_every_figure_and_load_nothing():
    text, page = demo_text(FOUND), demo_page(FOUND)
    for shown in (*BARS, "1.2 MB", "90%", "NOT protective"):
        assert shown in text
    for shown in (*BARS, "1.2 MB", "90%", "&lt;b&gt;too much&lt;/b&gt;"):
        assert shown in page
    assert page.count("<svg") == 1  # the loss; perplexity says the same
    assert_self_contained(page)


def test_settings_of_the_demo():
    made = demo_settings(["rows=64", "shares=[0.5, 0.3, 0.2]"])
    assert (made.rows, made.shares) == (64, (0.5, 0.3, 0.2))
    for wrong, said in (("rows", "key=value"), ("row=4", "rows"), ("shares=[1.0]", "adding up to 1")):
        with pytest.raises(SettingsError, match=said):
            demo_settings([wrong])


def test_the_demo_takes_jsonl_and_a_number_of_steps(command, tmp_path):
    run = run_file(tmp_path / "data", tmp_path / "model")
    assert "max_steps" in command.refused("private-demo", run, "-o", tmp_path / "demo", "-s", "train.max_steps=null")
    assert ".jsonl" in command.refused("private-demo", run, "-o", tmp_path / "demo", "-s", "data.train=rows.csv")
    assert "no such run file" in command.refused("private-demo", tmp_path / "none.yaml", "-o", tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_the_example_is_a_run_file_of_the_demo():
    values = yaml.safe_load((ROOT / "examples" / "private.yaml").read_text())
    assert values["private"]["labels"] == "home" and values["train"]["max_steps"] > 0


@pytest.mark.slow
def test_one_owner_and_two_parties_as_processes(command, tmp_path):
    run = run_file(tmp_path / "data", toy_model(tmp_path / "model"), count=48)
    small = [part for one in ("rows=40", "held_out=6", "keep_last=1", "middle=1", "attacked=4", "noise=[2]", "emulate=[]",
                              "attacks=[nearest-embedding, probe-table]") for part in ("--size", one)]
    found = command.json("private-demo", run, "-o", tmp_path / "demo", *small)
    assert list(found["bars"]) == BARS
    losses = {name: scores["loss"] for name, scores in found["bars"].items()}
    assert losses["split_tuned"] < losses["plugged_in"] < losses["base"] and losses["emulator_tuned"] < losses["emulator"]
    assert {name: (one["rows"], one["rounds"]) for name, one in found["parties"].items()} == {"a": (30, 2), "b": (10, 2)}
    assert all(one["up"] > 0 and one["down"] > 0 for one in found["parties"].values())
    assert {one["case"] for one in found["leakage"]["table"]} == {"none", "gaussian, 2 x rms"}
    assert json.loads((tmp_path / "demo" / "demo.json").read_text())["bars"] == found["bars"]
    assert_self_contained((tmp_path / "demo" / "report.html").read_text())
