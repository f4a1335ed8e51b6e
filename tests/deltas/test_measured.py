"""The table of measured rates agrees with the raw figures and the methods' own defaults, and is what run files fall back on."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from deltaloom.deltas.base import method_from
from deltaloom.deltas.measured import Rate, choice_for, default_rate, measured_rate, published_rate, table
from deltaloom.jobs.prepare import parse_parts
from deltaloom.jobs.runfile import parse_run
from deltaloom.registry import names_in

ROOT = Path(__file__).parents[2]
RAW = ROOT / "benchmarks" / "results" / "evidence"
ROWS = table().rates
RUN = {"model": "m", "task": "sequence-classification", "data": {"train": "a.jsonl"}}


def raw_losses() -> dict[tuple[str, str, bool], dict[float, float]]:
    """(candidate, budget, generates) -> the loss on held-out rows at each rate that was tried, with the seed that chose."""
    found: dict[tuple[str, str, bool], dict[float, float]] = defaultdict(dict)
    for path in RAW.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            spec = record.get("spec")
            if spec and spec["part"] == "held" and spec["limit"] is None and "loss" in record:
                found[spec["candidate"], spec["budget"], spec["task"] == "e2e"][spec["rate"]] = record["loss"]
    return found


def name(row: Rate) -> str:
    return f"{row.method}-{row.size:g}-{row.on.split()[0]}"


@pytest.mark.parametrize("row", [row for row in ROWS if row.run], ids=name)
def test_a_row_is_what_the_raw_figures_say(row):
    losses = raw_losses()[(*row.run, row.generates)]
    assert sorted(row.tried) == sorted(losses)
    assert row.rate == min(rate for rate, loss in losses.items() if loss <= 1.01 * min(losses.values()))


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_a_row_states_a_delta_that_exists_and_its_scale(row):
    method = method_from(dict(row.delta))
    settings = method.as_dict()
    assert row.rate in row.tried and (ROOT / row.page).is_file()
    if row.scale is not None and "scale" in settings:
        assert settings["scale"] == row.scale
    elif row.scale is not None:
        assert settings["alpha"] / settings["rank"] == row.scale
        defaults = type(method)().as_dict()
        assert defaults["alpha"] / defaults["rank"] == row.scale  # who states nothing gets the scale that the rates go with


def test_the_border_is_named():
    rates = {row.run: row for row in ROWS if row.run and not row.generates}
    assert rates["lora", "small"].border == ""
    assert "lower" in rates["tsvd-dct-entry", "small"].border and "higher" in rates["tsvd-dct-entry", "large"].border
    assert "only" in next(row for row in ROWS if len(row.tried) == 1).border


def test_published_rates_are_for_methods_without_a_row():
    assert {row.method for row in table().published}.isdisjoint({row.method for row in ROWS})
    assert {row.method for row in table().published} <= set(names_in("deltaloom.deltas"))
    assert published_rate({"method": "lora"}) is None and published_rate({"method": "full"}).rate < 1e-4


@pytest.mark.parametrize(("entry", "generates", "size", "rate"), [
    ({"method": "lora", "rank": 1}, False, None, 5e-3), ({"method": "lora", "rank": 1}, True, None, 6e-3),
    ({"method": "lora", "rank": 8}, False, None, 1e-3), ({"method": "lora", "rank": 64}, True, None, 1e-3),
    ({"method": "lora", "rank": 3}, False, None, 3e-3), ({"method": "lora", "rank": 1}, False, 0.1, 1e-2),
    ({"method": "tsvd", "rank": 1, "transform": "identity"}, False, None, 5e-3),
    ({"method": "tsvd", "rank": 1, "transform": "haar"}, False, None, 3e-3),
    ({"method": "fact-tt"}, True, 1.0, 3e-3)])  # measured on classes only: the nearest there is
def test_the_nearest_row_counts(entry, generates, size, rate):
    assert measured_rate(entry, generates=generates, size=size).rate == rate


def test_several_methods_take_the_lowest_and_the_unmeasured_the_common_one():
    small, none = {"method": "lora", "rank": 1}, {"method": "bitfit"}
    assert default_rate([small], generates=False) == 5e-3
    assert default_rate([small, {"method": "lora", "rank": 4}], generates=False) == 3e-3
    assert default_rate([small, none], generates=False) == default_rate([none], generates=False) == table().otherwise
    assert default_rate([], generates=False) == table().otherwise


@pytest.mark.parametrize(("deltas", "train", "rate"), [
    ([{"method": "lora", "rank": 1}], {}, 5e-3), ([{"method": "lora", "rank": 1}], {"learning_rate": 2e-4}, 2e-4),
    ([{"method": "lora", "rank": 1}], {"optimizer": "sgd"}, 1e-3),  # AdamW's rates say nothing of another optimizer's
    ([{"method": "lora"}], {}, 1e-3), ([{"preset": "mam"}], {}, 1e-3), ([{"method": "bitfit"}], {}, 1e-3)])
def test_a_run_file_that_names_no_rate_gets_the_measured_one(deltas, train, rate):
    assert parse_parts(parse_run(RUN | {"deltas": deltas, "train": train}, base=Path())).train.learning_rate == rate


@pytest.mark.parametrize(("size", "generates", "method", "fit"), [
    (0.1, False, "lora", "sites"), (0.99, True, "lora", "sites"), (1, False, "lora", "rank"), (4, False, "tsvd", "rank"),
    (4, True, "lora", "rank"), (50, False, "lora", "rank"), (None, False, "lora", "rank")])
def test_a_budget_buys_what_was_measured_at_its_size(size, generates, method, fit):
    choice = choice_for(size, generates=generates)
    assert (choice.delta["method"], choice.fit) == (method, fit)
    assert (ROOT / choice.page).is_file()
    method_from(dict(choice.delta))
