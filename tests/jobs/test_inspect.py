"""`inspect` on saved deltas: the tables that a person reads, against the record."""

import json

import pytest

from deltaloom.checkpoint import native
from deltaloom.checkpoint.record import RECORD, read_record
from deltaloom.deltas.bitfit import BitFit
from deltaloom.deltas.dora import DoRA
from deltaloom.deltas.lora import LoRA
from deltaloom.deltas.prefix import Prefix
from deltaloom.jobs.inspect import SHOWN, inspect
from deltaloom.tuned import attach
from tests.contract.cases import perturb
from tests.toys import toy


def inspected(folder, *methods):
    tuned = attach(toy("llama"), list(methods))
    perturb(tuned)
    native.save(tuned, folder, base={"source": "toy", "fingerprint": "f" * 64})
    return again(folder)


def again(folder):
    said = []
    return inspect(folder, say=said.append), "\n".join(said).splitlines()


def test_the_table_of_groups_has_rho_beside_1_over_n(tmp_path):
    found, said = inspected(tmp_path / "d", LoRA(rank=2, targets=("q", "k"), rank_pattern={"layers.1.self_attn.q_proj": 5}))
    start = next(number for number, line in enumerate(said) if line.startswith("role"))
    assert said[start].split() == ["role", "shape", "layers", "mean", "rank", "rho", "1/N", "residual"]
    rho = {group["role"]: group["rho"] for group in found["groups"]}
    assert said[start + 1].split() == ["q", "16", "x", "16", "2", "3.5", "(2", "to", "5)", f"{rho['q']:.4g}", "0.5"]
    assert said[start + 2].split() == ["k", "8", "x", "16", "2", "2", f"{rho['k']:.4g}", "0.5"]
    assert found["groups"] == [group.model_dump(mode="json") for group in read_record(tmp_path / "d").groups]


def test_methods_are_named_where_there_are_several_and_nothing_is_said_of_groups_without_facts(tmp_path):
    _, said = inspected(tmp_path / "d", LoRA(rank=2, targets="q"), DoRA(rank=2, targets="down"))
    assert [line.split()[:2] for line in said[-2:]] == [["lora", "q"], ["dora", "down"]]
    found, said = inspected(tmp_path / "e", BitFit(targets="q"))
    assert found["groups"][0]["rho"] is None and not any("rho" in line for line in said)


def test_shared_modules_are_shown_with_their_parameters(tmp_path):
    found, said = inspected(tmp_path / "d", Prefix(length=2, reparametrise=5))
    shared = found["shared"][0]
    assert shared["parameters"] == found["parameters"]
    assert any(line.split() == ["network", "(shared)", f"{shared['parameters']:,}"] for line in said)


def test_many_groups_are_cut_and_said(tmp_path):
    inspected(tmp_path / "d", LoRA(rank=2, targets="q"))
    values = json.loads((tmp_path / "d" / RECORD).read_text())
    values["groups"] = values["groups"] * (SHOWN + 3)
    (tmp_path / "d" / RECORD).write_text(json.dumps(values))
    found, said = again(tmp_path / "d")
    assert len(found["groups"]) == SHOWN + 3 and said[-1] == "... and 3 more; --json lists all"


def test_a_group_of_an_unknown_method_is_shown(tmp_path):
    inspected(tmp_path / "d", LoRA(rank=2, targets=("q", "k")))
    values = json.loads((tmp_path / "d" / RECORD).read_text())
    values["groups"][1]["method"] = 7
    (tmp_path / "d" / RECORD).write_text(json.dumps(values))
    _, said = again(tmp_path / "d")
    assert said[-1].split()[:2] == ["7", "k"]


def test_an_old_record_has_no_groups(tmp_path):
    inspected(tmp_path / "d", LoRA(rank=2, targets="q"))
    values = json.loads((tmp_path / "d" / RECORD).read_text())
    for key in ("groups", "shared"):
        values.pop(key, None)
    (tmp_path / "d" / RECORD).write_text(json.dumps(values))
    assert read_record(tmp_path / "d").groups == []
    found, said = again(tmp_path / "d")
    assert found["groups"] == [] and not any("rho" in line for line in said)


@pytest.mark.parametrize("shape", [[1], [1, 2, 3], "16x16"])
def test_a_group_without_a_shape_is_refused(shape, tmp_path):
    inspected(tmp_path / "d", LoRA(rank=2, targets="q"))
    values = json.loads((tmp_path / "d" / RECORD).read_text())
    values["groups"][0]["shape"] = shape
    (tmp_path / "d" / RECORD).write_text(json.dumps(values))
    with pytest.raises(Exception, match="not a record of a delta"):
        inspect(tmp_path / "d", say=lambda text: None)
