"""A pool picked by the input text on the command line: what a run leaves, and who is used when."""

from __future__ import annotations

import json

import pytest

from tests.jobs.small import run_values, write_run

ROUTE = {"method": "route", "delta": {"method": "prefix", "length": 2}, "pool": 3, "top": 1}


@pytest.mark.parametrize("kind", ["classes", "prompts"])
def test_the_report_shows_who_is_used_when(kind, models, tmp_path, command):
    path = write_run(tmp_path, run_values(kind, models, tmp_path, [ROUTE], max_steps=4))
    found, run = command.json("tune", path), tmp_path / "run"
    records = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (event,) = [record for record in records if record["event"] == "Routed"]
    everything, *others = event["groups"]
    assert everything["by"] == "all" and everything["rows"] == event["rows"] and len(everything["shares"]) == 3
    assert all(sum(group["shares"]) == pytest.approx(1) for group in event["groups"])
    assert bool(others) == (kind == "classes")
    if others:
        assert {group["by"] for group in others} == {"label"} and sum(group["rows"] for group in others) == event["rows"]
        for entry in range(3):
            mean = sum(group["rows"] * group["shares"][entry] for group in others) / event["rows"]
            assert mean == pytest.approx(everything["shares"][entry])
    page = (run / "report.html").read_text()
    assert 'id="choices"' in page and "Who is used when?" in page
    assert not [record for record in records if record["event"] == "Warned" and record["kind"] != "peft"]
    assert command.json("eval", run, "--data", tmp_path / "dev.jsonl")["metrics"] == found["metrics"]
    assert command.json("tune", path, "--resume")["metrics"] == found["metrics"]
