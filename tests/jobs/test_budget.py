"""The section `budget`: what it means, what is refused before the first step, and what is said at the end."""

from __future__ import annotations

import json

import pytest

from deltaloom.errors import SettingsError
from deltaloom.jobs.budget import BudgetSettings, overrides_of
from tests.jobs.small import run_values, write_run

LORA = {"method": "lora", "rank": 2}


@pytest.mark.parametrize(("given", "numbers"), [("0.25%", 2500), ("7", 7), (7, 7), ("100%", 1_000_000), (None, None)])
def test_parameters_are_a_count_or_a_share(given, numbers):
    assert BudgetSettings(parameters=given).numbers(1_000_000) == numbers


@pytest.mark.parametrize(("given", "size"), [("4GB", 4 * 10**9), ("2GiB", 2 * 2**30), ("1.5 kB", 1500), (12, 12), (None, None)])
def test_memory_is_a_size(given, size):
    assert BudgetSettings(memory=given).bytes == size


@pytest.mark.parametrize("values", [{"parameters": "0%"}, {"parameters": "101%"}, {"parameters": 0}, {"parameters": "much"},
                                    {"parameters": "1%%"}, {"parameters": True}, {"parameters": -3}, {"memory": "4"},
                                    {"memory": "0GB"}, {"memory": "4 gigs"}, {"memory": "4Gb"}, {"disk": "4GB"}])
def test_nonsense_is_refused(values):
    with pytest.raises(SettingsError):
        BudgetSettings.parse(values, "budget")


@pytest.mark.parametrize(("texts", "found"), [
    ([], []), (["0.25%"], ["budget.parameters='0.25%'"]), (["200000"], ["budget.parameters='200000'"]),
    (["2GB", "20m"], ["budget.memory='2GB'", "train.max_time='20m'"]), (["20m", "20m"], ["train.max_time='20m'"])])
def test_budgets_of_the_command_line_are_overrides(texts, found):
    assert overrides_of(texts) == found


@pytest.mark.parametrize(("texts", "others", "says"), [
    (["1%", "2%"], [], "1% and 2%"), (["1%", "500"], [], "contradictory"), (["2GB", "3GB"], [], "contradictory"),
    (["1%"], ["budget.parameters=2%"], "contradictory"), (["20m"], ["train.max_time=10m"], "contradictory"),
    (["a lot"], [], "this is no budget"), ([""], [], "0.25%"), (["20M"], [], "this is no budget"),
    (["-5%"], [], "this is no budget")])
def test_contradictions_and_nonsense_of_the_command_line(texts, others, says):
    with pytest.raises(SettingsError, match=says):
        overrides_of(texts, others)


@pytest.fixture
def start(models, tmp_path):
    return write_run(tmp_path, run_values("classes", models, tmp_path, [LORA]))


def test_more_numbers_than_allowed_are_refused_before_anything_is_written(start, command):
    for name in ("plan", "tune"):
        message = command.refused(name, start, "-s", "budget.parameters=50")
        assert "budget.parameters" in message and "--advise" in message and "at most 50" in message
    assert not (start.parent / "run").exists()
    assert command.json("tune", start, "-s", "budget.parameters=50%")["final_parameters"] > 50


def test_more_memory_than_allowed_is_refused(start, command):
    found = command.json("plan", start, "-s", "budget.memory=20kB")
    assert found["fits"] is False
    for length in ("train.max_steps=3", "train={max_time: 5s}"):
        message = command.refused("tune", start, "-s", length, "-s", "budget.memory=20kB", code=3)
        assert "training needs at least" in message
    assert not (start.parent / "run").exists()


def test_a_method_that_changes_its_size_is_judged_at_the_end(start, command, models, tmp_path):
    adaptive = {"method": "adalora", "rank": 1, "start": 0.2, "end": 0.4, "every": 2}
    path = write_run(tmp_path, run_values("classes", models, tmp_path, [adaptive], max_steps=8) | {"budget": {"parameters": 10}})
    found = command.json("tune", path)
    assert found["final_parameters"] > 10
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (warning,) = [event for event in events if event.get("kind") == "budget"]
    assert "allows 10" in warning["message"]
    assert "allows 10" in (tmp_path / "run" / "report.html").read_text()
