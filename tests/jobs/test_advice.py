"""Rules of advice, each on facts that are made to trigger it and on facts that are not; numbers are counted again by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaloom.deltas.base import method_from
from deltaloom.deltas.measured import table
from deltaloom.errors import SettingsError
from deltaloom.jobs import advice as rules
from deltaloom.jobs.advice import Draft, Facts, Place, advised

ROOT = Path(__file__).parents[2]
PLACES = [Place(f"block.{layer}.{role}", role, layer, 32) for layer in range(3) for role in ("q", "k", "v", "o")]
UNIT = 32 * len(PLACES)
PLENTY = {"rows": 5000, "lengths": [40] * 5000, "longest": 512, "unit": UNIT, "places": PLACES, "eval_rows": 100}
LORA = {"method": "lora", "rank": 8, "alpha": 16}
EVAL = {"data": {"train": "a", "eval": "b"}}


def facts(**changes):
    return Facts(**{**PLENTY, **changes})


def said(rule, values=None, **changes):
    """What one rule proposes: {setting: value}, and the reasons as one text."""
    found = list(rule(facts(**changes), Draft(values or EVAL)))
    assert all(each.reason and each.evidence for each in found)
    return {each.setting: each.value for each in found}, " ".join(each.reason for each in found)


def test_a_run_file_that_says_all_and_facts_without_a_fault_get_no_advice():
    values = EVAL | {"deltas": [LORA], "train": {"learning_rate": 1e-3, "batch_size": 16, "epochs": 1}}
    assert advised(facts(), Draft(values)) == []


def test_repeated_rows_and_leaks_are_counted_and_nothing_is_set():
    found, reason = said(rules.duplicates, rows=40, duplicates=7)
    assert found == {"data.train": None} and "7 of 40" in reason
    found, reason = said(rules.leak, eval_rows=12, overlap=3)
    assert found == {"data.eval": None} and "3 of 12" in reason and "leak" in reason
    draft = Draft(EVAL)
    advised(facts(duplicates=7, overlap=3), draft)
    assert draft.values["data"] == EVAL["data"]
    assert said(rules.duplicates)[0] == said(rules.leak)[0] == {}


def test_something_is_held_out():
    assert said(rules.held_out, {"data": {"train": "a"}})[0] == {"data.eval_fraction": 0.1}
    assert said(rules.held_out, {"data": {"train": "a"}}, rows=19)[0] == {}
    assert said(rules.held_out)[0] == said(rules.held_out, {"data": {"train": "a", "eval_fraction": 0.3}})[0] == {}


@pytest.mark.parametrize(("lengths", "stated", "longest", "wanted", "says"), [
    ([10, 20, 300], None, 512, 304, "1 of 3"), ([10, 20, 300], 16, 512, 304, "2 of 3"),
    ([10, 300, 900], 64, 512, 512, "1 are longer"),
    ([10, 256], None, 512, None, ""), ([900], 512, 512, None, ""), ([900], 600, 512, None, ""), ([90], 64, 90, 90, "")])
def test_nothing_is_cut_that_the_model_could_take(lengths, stated, longest, wanted, says):
    values = {"data": {"train": "a"} | ({"max_length": stated} if stated else {})}
    found, reason = said(rules.length, values, rows=len(lengths), lengths=lengths, longest=longest)
    assert found.get("data.max_length") == wanted and says in reason


@pytest.mark.parametrize(("labels", "classes", "stated", "speaks"), [
    ({"a": 90, "b": 10}, True, {}, True), ({"a": 79, "b": 21}, True, {}, False), ({"a": 90, "b": 10}, False, {}, False),
    ({}, True, {}, False), ({"a": 90, "b": 10}, True, {"metric": "loss"}, False)])
def test_a_metric_that_sees_rare_classes(labels, classes, stated, speaks):
    found, reason = said(rules.metric, EVAL | {"train": stated}, labels=labels, classes=classes)
    assert found == ({"train.metric": "macro_f1"} if speaks else {})
    if speaks:  # always 'a': precision 0.9, recall 1, and a class that is never found
        assert "90%" in reason and f"{(2 * 0.9 * 1 / 1.9 + 0) / 2:.2f}" in reason
    targeted = EVAL | {"strategy": {"target_metric": {"accuracy": 1}}}
    assert said(rules.metric, targeted, labels={"a": 90, "b": 10}, classes=True)[0] == {}


def entry(values=None, **changes):
    found, reason = said(rules.method, values, **changes)
    if not found:
        return None, reason
    (one,) = found["deltas"]
    method_from(dict(one))
    return one, reason


def test_a_method_where_none_is_stated_or_the_stated_one_does_not_do():
    assert entry()[0] == LORA | {"targets": "all-linear"}
    few, reason = entry(rows=999)
    assert (few["method"], few["rank"], few["alpha"]) == ("lora", 1, 2) and "999 rows" in reason
    assert entry(EVAL | {"deltas": [LORA]})[0] is None
    assert entry(EVAL | {"deltas": [LORA]}, limit=UNIT, stated_numbers=UNIT)[0] is None
    assert entry(EVAL | {"deltas": [LORA]}, limit=UNIT, stated_numbers=None)[0] is None  # changes its size in training
    smaller, reason = entry(EVAL | {"deltas": [LORA]}, limit=UNIT, stated_numbers=8 * UNIT)
    assert smaller["rank"] == 1 and f"{8 * UNIT:,} numbers" in reason


def test_what_is_to_be_merged_is_something_that_can_be():
    prefix = EVAL | {"deltas": [{"method": "prefix", "length": 4}]}
    found, reason = entry(prefix, merge=True, unmergeable="a PrefixDelta adds rows")
    assert found["method"] == "lora" and "adds rows" in reason
    assert entry(prefix, merge=False, unmergeable="a PrefixDelta adds rows")[0] is None
    assert entry(prefix, merge=True)[0] is None


@pytest.mark.parametrize("generates", [False, True])
@pytest.mark.parametrize("share", [0.09, 0.3, 0.99, 1, 1.9, 2, 3.7, 4, 6, 8, 100])
def test_what_a_budget_buys_fits_it(share, generates):
    limit = int(share * UNIT)
    found, _ = entry(limit=limit, generates=generates)
    if isinstance(found["targets"], str):
        assert found["rank"] * UNIT <= limit and (found["method"] == "tsvd") == (not generates and 2 <= share < 8)
        assert found["rank"] == min(int(share), {"tsvd": 4, "lora": 8 if share >= 2 else 1}[found["method"]])
    else:
        cost = {place.name: place.cost for place in PLACES}
        used = sum(cost[name] for name in found["targets"])
        assert used <= limit and (limit - used < 32 or len(found["targets"]) == 6)  # filled, or all values and queries
        assert found["targets"] == ["block.2.v", "block.2.q", "block.1.v", "block.1.q", "block.0.v", "block.0.q"][:used // 32]
    if "alpha" in found:
        assert found["alpha"] == 2 * found["rank"]


def test_a_budget_below_everything_is_refused():
    with pytest.raises(SettingsError, match="at least 32"):
        entry(limit=31)


def test_where_no_layer_is_a_query_or_a_value_all_count():
    places = [Place(f"x.{layer}", "linear", layer, 32) for layer in range(3)]
    assert entry(places=places, unit=96, limit=70)[0]["targets"] == ["x.2", "x.1"]


@pytest.mark.parametrize(("length", "rows", "train", "on_cpu", "wanted"), [
    (5, 5000, {}, True, 56), (16, 5000, {}, True, None), (5, 5000, {"batch_size": 4}, True, 56), (5, 5000, {}, False, None),
    (5, 160, {}, True, 20), (5, 40, {}, True, None), (5, 5000, {"batch_size": 64}, True, None)])
def test_a_step_is_worth_its_weights(length, rows, train, on_cpu, wanted):
    found, reason = said(rules.batch, EVAL | {"train": train}, rows=rows, lengths=[length] * rows, on_cpu=on_cpu)
    assert found.get("train.batch_size") == wanted
    if wanted:
        assert f"{train.get('batch_size', 16) * length} tokens" in reason
        assert wanted * length >= 256 or wanted == rows // 8


def test_a_step_counted_in_tokens():
    assert said(rules.batch, EVAL | {"train": {"batch_tokens": 100}})[0] == {"train.batch_tokens": 256}
    assert said(rules.batch, EVAL | {"train": {"batch_tokens": 256}})[0] == {}
    assert said(rules.batch, {"data": {"max_length": 4}}, lengths=[40] * 5000)[0] == {"train.batch_size": 64}  # as it is cut


@pytest.mark.parametrize(("rows", "train", "epochs"), [
    (960, {}, None), (959, {}, None), (944, {}, 2), (160, {}, 6), (16, {}, 10), (160, {"batch_size": 4}, 2),
    (160, {"epochs": 1}, None), (160, {"max_steps": 5}, None),
    (160, {"max_time": "1m"}, None), (160, {"batch_tokens": 6400}, 10)])
def test_few_rows_are_seen_several_times(rows, train, epochs):
    found, _ = said(rules.passes, EVAL | {"train": train}, rows=rows, lengths=[40] * rows)
    assert found.get("train.epochs") == epochs


def test_the_best_stays_where_rows_are_seen_often():
    often = {"train": {"epochs": 3}}
    assert said(rules.stopping, EVAL | often)[0] == {"train.early_stop": {"patience": 3}, "train.restore_best": True}
    assert said(rules.stopping, EVAL | {"train": {"epochs": 2}})[0] == {}
    assert said(rules.stopping, {"data": {"train": "a"}} | often)[0] == {}
    assert said(rules.stopping, EVAL | often | {"strategy": {}})[0] == {}
    assert said(rules.stopping, EVAL | {"train": {"epochs": 3, "restore_best": False, "early_stop": {"patience": 9}}})[0] == {}


def test_a_long_pass_is_looked_at_on_its_way():
    assert said(rules.looks, rows=9600)[0] == {"train.eval_every": 0.1}
    assert said(rules.looks, rows=9584)[0] == {}
    assert said(rules.looks, {"data": {"train": "a"}}, rows=9600)[0] == {}
    assert said(rules.looks, EVAL | {"train": {"eval_every": 50}}, rows=9600)[0] == {}


def test_packing_where_much_would_be_padding():
    unlike = [200] + [10] * 15
    found, reason = said(rules.packing, rows=16, lengths=unlike, packable=True)
    # one step: micro-batches of at most 2,048 tokens are ten rows of width 200 and six of width 10
    assert found == {"train.packing": True} and f"{1 - 350 / (10 * 200 + 6 * 10):.0%}" in reason
    assert said(rules.packing, rows=16, lengths=[100] * 16, packable=True)[0] == {}
    assert said(rules.packing, rows=16, lengths=unlike)[0] == {}
    assert said(rules.packing, EVAL | {"train": {"packing": False}}, rows=16, lengths=unlike, packable=True)[0] == {}


def rate(deltas, train=None, **changes):
    found, reason = said(rules.rate, EVAL | {"deltas": deltas, "train": train or {}}, **changes)
    return found.get("train.learning_rate"), reason


def test_the_rate_is_the_measured_one():
    value, reason = rate([LORA])
    assert value == 1e-3 and "0.0005, 0.001, 0.002" in reason and "scale 2" in reason and "may be better" not in reason
    value, reason = rate([{"method": "tsvd", "transform": "dct", "rank": 4}])
    assert value == 3e-3 and "higher ones may be better" in reason
    narrow = {"method": "lora", "rank": 1, "targets": ["block.2.v"]}
    assert rate([narrow])[0] == 1e-2 and rate([narrow | {"targets": "all-linear"}])[0] == 5e-3
    value, reason = rate([{"method": "fact-tt", "rank": 4}], generates=True)
    assert value == 3e-3 and "tasks of this kind were not measured" in reason


def test_rates_of_several_methods_and_of_none_that_was_measured():
    value, reason = rate([{"method": "lora", "rank": 1}, {"method": "bitfit"}])
    assert value == table().otherwise and "combinations were not measured" in reason and "0.001" in reason
    value, reason = rate([{"method": "full"}])
    assert value == 1e-5 and "none of these" in reason
    assert rate([{"method": "bitfit"}]) == (None, "")
    assert rate([{"method": "full"}], {"learning_rate": 1e-3}) == (None, "")
    assert rate([{"from": "elsewhere"}]) == (None, "") and rate([LORA], {"optimizer": "sgd"}) == (None, "")


@pytest.mark.parametrize(("stated", "speaks"), [(1e-3, False), (2e-4, False), (6e-3, False), (2e-5, True), (6.1e-3, True)])
def test_a_stated_rate_is_questioned_only_far_from_all_that_were_tried(stated, speaks):
    value, reason = rate([LORA], {"learning_rate": stated})
    assert (value == 1e-3 and f"{stated:g} is far" in reason) if speaks else (value is None)


def test_a_rule_sees_what_those_before_it_proposed():
    draft = Draft({"data": {"train": "a"}})
    found = {each.setting: each for each in advised(facts(rows=160, lengths=[5] * 160), draft)}
    assert draft.get("train.batch_size") == 20 and found["train.epochs"].value == 8  # 160 rows in steps of 20
    assert draft.get("train.early_stop") == {"patience": 3}  # because of these epochs, and of eval_fraction
    assert found["deltas"].present is None and draft.get("deltas") == found["deltas"].value
    assert advised(facts(rows=160, lengths=[5] * 160), draft) == []  # what is followed is not advised again


def test_every_page_that_is_named_as_evidence_exists():
    everything = facts(rows=160, lengths=[5, 300] * 80, duplicates=1, overlap=1, labels={"a": 9, "b": 1}, classes=True,
                       packable=True)
    found = advised(everything, Draft({"data": {"train": "a"}}))
    found += advised(facts(rows=10_000, limit=4 * UNIT), Draft(EVAL))
    assert {each.setting for each in found} >= {"data.train", "data.eval", "train.metric", "deltas", "train.eval_every",
                                                "train.packing"}
    for each in found:
        page = each.evidence.split(";")[0]
        assert not page.startswith("docs/") or (ROOT / page).is_file()
