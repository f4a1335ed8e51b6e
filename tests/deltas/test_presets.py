from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deltaloom
from deltaloom.deltas.base import method_from, method_record, methods_from
from deltaloom.deltas.presets import expanded, preset, preset_names
from deltaloom.errors import SettingsError
from deltaloom.jobs.methods import method_text, one_or_all
from deltaloom.jobs.prepare import parse_parts
from deltaloom.jobs.runfile import parse_run
from deltaloom.tuned import attach
from tests.contract.cases import perturb, steps
from tests.toys import LAYOUTS, toy, toy_batch


def run(deltas: list[dict]) -> list[dict]:
    """The deltas as a resolved run file holds them."""
    file = {"model": "m", "task": "causal-lm", "data": {"train": "t.jsonl"}, "deltas": deltas}
    return [method_record(method) for method in parse_parts(parse_run(file, base=Path())).methods]


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_its_plain_list(name: str) -> None:
    found = preset(name)
    assert found.summary.endswith(".") and found.text
    assert run([{"preset": name}]) == run(list(found.deltas)) == [method_record(method) for method in deltaloom.preset(name)]
    assert len(found.deltas) > 1
    shown = method_text(one_or_all(name), full=True)
    assert found.summary in shown and "placement: " in shown and "Settings" not in shown


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", preset_names())
def test_a_preset_trains_on_every_layout(name: str, layout: str) -> None:
    tuned, batch = attach(toy(layout), deltaloom.preset(name)), toy_batch(layout)
    with torch.no_grad():
        before = tuned(**batch).loss
    steps(tuned, batch, 5)
    with torch.no_grad():
        assert tuned(**batch).loss < before
    assert {attached.method.name for attached in tuned.attached()} >= ({"prefix"} if name == "mam" else {"gated"})


def test_mam_is_a_prefix_and_a_parallel_network_by_hand() -> None:
    """The parts alone, as methods written out, on one seed: the same numbers as the preset's."""
    settings = {"prefix": {"length": 3}, "bottleneck": {"size": 4, "scale": 4.0}}
    written = [{"method": "prefix", "length": 3}, {"method": "bottleneck", "placement": "parallel", "size": 4, "scale": 4.0}]
    answers = []
    for methods in (deltaloom.preset("mam", settings), methods_from(written)):
        tuned = attach(toy("bert"), methods)
        perturb(tuned)
        with torch.no_grad():
            answers.append(tuned(**toy_batch("bert")).logits)
    assert torch.equal(*answers)


def test_settings_go_to_the_method_that_they_name_through_its_gate() -> None:
    first, second = run([{"method": "bitfit"}, {"preset": "unipelt", "lora": {"rank": 2}}])[0::3]
    assert first["method"] == "bitfit" and second["method"] == "gated"
    assert (second["delta"]["method"], second["delta"]["rank"], second["delta"]["alpha"]) == ("lora", 2, 8.0)
    assert [place for place, _ in expanded([{"method": "bitfit"}, {"preset": "mam"}])] == ["deltas.0", "deltas.1", "deltas.1"]
    assert preset("unipelt").deltas[2]["delta"]["rank"] == 8, "the file's own list stays as it is"


@pytest.mark.parametrize("entry,match", [
    ({"preset": "man"}, r"deltas\.0: unknown preset.*'mam'"),
    ({"preset": "mam", "lora": {"rank": 2}}, r"deltas\.0: a preset takes.*lora"),
    ({"preset": "mam", "prefix": 3}, r"a preset takes a mapping"),
    ({"preset": "mam", "prefix": {"lenght": 3}}, r"deltas\.0 \(prefix\).*length"),
    ({"preset": ["mam"]}, "unknown preset"),
    ({"method": "mam"}, r"write \{preset: mam\}")])
def test_bad_presets_are_errors(entry: dict, match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        run([entry])


def test_a_methods_own_preset_stays_its_own() -> None:
    assert run([{"method": "tsvd", "preset": "literal"}]) == [method_record(method_from({"method": "tsvd", "preset": "literal"}))]


def test_lists_of_other_parts_take_presets_too() -> None:
    from deltaloom.compress.heal import Heal
    from deltaloom.jobs.party import own_methods
    from deltaloom.private.settings import PrivateSettings

    personal = own_methods(PrivateSettings(personal=({"preset": "mam"},)), (), methods_from)
    assert [method.name for method in personal] == ["prefix", "bottleneck"]
    with pytest.raises(SettingsError, match="lists methods"):
        own_methods(PrivateSettings(personal=({"from": "runs/a"},)), (), methods_from)
    Heal(deltas=({"preset": "unipelt"},))
    with pytest.raises(SettingsError, match="unknown preset"):
        Heal(deltas=({"preset": "unipelr"},))
