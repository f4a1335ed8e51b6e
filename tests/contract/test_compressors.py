"""Laws that every compressor has to keep on every layout."""

from __future__ import annotations

import json

import pytest
import torch

from deltaloom.checkpoint.merged import save_merged
from deltaloom.compress.base import compressor_from, compressor_record, weight_bytes
from deltaloom.errors import DeltaloomError, SettingsError
from deltaloom.registry import names_in
from tests.compress.works import deep_toy, meta_of
from tests.contract.compressors import BEFORE, BLOCKS, EXAMPLES, IMPOSSIBLE, PACKAGE, REFUSED, Case, all_cases, done, logits

CASES = all_cases()
each_case = pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])


def shapes(model):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}


@each_case
def test_the_sketch_is_what_the_work_makes(case: Case) -> None:
    work, _ = done(case)
    sketch = case.sketched()
    assert all(tensor.is_meta for tensor in sketch.state_dict().values())
    assert shapes(sketch).keys() == shapes(work.model).keys()
    assert weight_bytes(sketch) == weight_bytes(work.model)
    if not case.step().estimates:
        assert sum(p.numel() for p in sketch.parameters()) == sum(p.numel() for p in work.model.parameters())


@each_case
def test_the_result_runs_and_says_something_else(case: Case) -> None:
    work, _ = done(case)
    found = logits(work.model, case.layout)
    assert bool(found.isfinite().all())
    assert not torch.equal(found, logits(deep_toy(case.layout, BLOCKS), case.layout))
    assert not work.model.training


@each_case
def test_the_same_work_gives_the_same_model_and_facts(case: Case) -> None:
    work, facts = done(case)
    again, others = case.applied()
    mine, its = work.model.state_dict(), again.model.state_dict()
    assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)
    drop = {"seconds"}
    assert {k: v for k, v in facts.figures.items() if k not in drop} == {k: v for k, v in others.figures.items() if k not in drop}
    assert facts.layers == others.layers


@each_case
def test_the_facts_are_json(case: Case) -> None:
    _, facts = done(case)
    record = json.loads(json.dumps(facts.as_dict(), allow_nan=False))
    assert all("layer" in layer for layer in record["layers"])
    assert record["figures"] or record["layers"]


@each_case
def test_the_saved_folder_says_the_same(case: Case, tmp_path) -> None:
    work, _ = done(case)
    save_merged(work.model, None, tmp_path / "model")
    again = type(work.model).from_pretrained(tmp_path / "model", dtype="auto")
    assert torch.equal(logits(again, case.layout), logits(work.model, case.layout))


@pytest.mark.parametrize("name", names_in(PACKAGE))
def test_settings_are_read_back_and_unknown_ones_refused(name: str) -> None:
    for settings in EXAMPLES.get(name, [{}]):
        step = compressor_from({"method": name} | settings)
        assert compressor_from(json.loads(json.dumps(compressor_record(step)))) == step
    with pytest.raises(SettingsError, match="no_such_setting"):
        compressor_from({"method": name, "no_such_setting": 1} | EXAMPLES.get(name, [{}])[0])


@pytest.mark.parametrize("name", names_in(PACKAGE))
def test_what_cannot_be_met_is_refused_before_any_work(name: str) -> None:
    for settings in IMPOSSIBLE[name]:
        model = meta_of(deep_toy("llama", BLOCKS))
        for record in BEFORE.get(name, []):
            compressor_from(record).sketch(model)
        with pytest.raises(DeltaloomError) as caught:
            compressor_from({"method": name} | settings).sketch(model)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize(("name", "layout"), REFUSED)
def test_what_does_not_fit_a_layout_is_refused_with_the_reason(name: str, layout: str) -> None:
    with pytest.raises(DeltaloomError, match=REFUSED[name, layout]):
        Case(name, 0, layout).sketched()


def test_an_unknown_compressor_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"Did you mean 'drop-layers'\?"):
        compressor_from({"method": "droplayers"})
    with pytest.raises(SettingsError, match="method: NAME"):
        compressor_from({"ratio": 0.5})
