"""How much the layers' changes resemble one another, against dense matrices in float64."""

import json

import pytest
import torch

from deltaloom.checkpoint import depth, native
from deltaloom.checkpoint.record import RECORD, delta_file_facts, read_record
from deltaloom.deltas.base import LowRankDelta
from deltaloom.deltas.bitfit import BitFit
from deltaloom.deltas.bottleneck import Bottleneck
from deltaloom.deltas.dora import DoRA
from deltaloom.deltas.full import Full
from deltaloom.deltas.ia3 import IA3
from deltaloom.deltas.lora import LoRA
from deltaloom.deltas.prefix import Prefix
from deltaloom.tuned import attach
from tests.contract.cases import all_cases, perturb
from tests.toys import toy


def dense_rho(changes):
    """The largest eigenvalue of the Gram matrix of the flattened changes over its trace."""
    whole = torch.stack([change.double().flatten() for change in changes])
    values = torch.linalg.eigvalsh(whole @ whole.T)
    return float(values[-1] / values.sum())


def changes_by_role(tuned):
    """Each role's dense changes over the layers, made from the folded weights."""
    found = {}
    for site, delta in tuned.pairs():
        layer = tuned.model.get_submodule(site.path).base
        weight = (layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight).detach().double()
        weight = weight[slice(*site.part)] if site.part else weight
        own = delta.override().get("weight")
        changed = delta.fold(weight, None)[0] if own is None else own.double().T if own.shape != weight.shape else own.double()
        found.setdefault(site.role, []).append(changed.detach() - weight)
    return found


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [LoRA(rank=2), DoRA(rank=2), Full(targets="all-linear"), IA3()], ids=lambda each: each.name)
def test_rho_is_that_of_dense_matrices(method, layout):
    tuned = attach(toy(layout), [method])
    perturb(tuned)
    expected = {role: dense_rho(changes) for role, changes in changes_by_role(tuned).items()}
    found = depth.group_facts(tuned)
    assert {group.role: group.rho for group in found} == pytest.approx(expected, rel=1e-5)
    assert all(group.layers == 2 and 0.5 <= group.rho <= 1 for group in found)
    sites = {site.role: site for site, _ in tuned.pairs()}
    assert all(group.shape == (sites[group.role].d_out, sites[group.role].d_in) for group in found)


@torch.no_grad()
def test_equal_changes_have_rho_1_and_orthogonal_ones_1_over_n():
    tuned = attach(toy("llama"), [LoRA(rank=2, targets=("q", "k"))])
    perturb(tuned)
    deltas = {(site.role, site.layer): delta for site, delta in tuned.pairs()}
    for place, tensor in deltas["q", 1].state_dict().items():
        tensor.copy_(deltas["q", 0].state_dict()[place] * 0.5)
    for layer in (0, 1):  # their outputs lie in different coordinates
        for parameter in deltas["k", layer].parameters():
            if parameter.shape == (8, 2):
                parameter.zero_()[4 * layer:4 * layer + 2] = torch.eye(2)
            else:
                parameter.zero_()[:, :2] = torch.eye(2)
    found = {group.role: group.rho for group in depth.group_facts(tuned)}
    assert found["q"] == pytest.approx(1) and found["k"] == pytest.approx(1 / 2)


def test_nothing_has_changed_yet_so_there_is_no_rho():
    groups = depth.group_facts(attach(toy("llama"), [LoRA(rank=2)]))
    assert groups and all(group.rho is None and group.ranks == [2, 2] for group in groups)


def test_ranks_are_in_the_order_of_the_layers():
    tuned = attach(toy("llama"), [LoRA(rank=2, targets="q", rank_pattern={"layers.1.self_attn.q_proj": 5})])
    assert [group.ranks for group in depth.group_facts(tuned)] == [[2, 5]]


def test_groups_are_linear_sites_of_one_method_in_several_layers():
    tuned = attach(toy("llama"), [LoRA(rank=2, targets="q"), LoRA(rank=3, targets=("q", "k")),
                                  LoRA(rank=2, targets="v", layers="1"), Prefix(length=2), Bottleneck(size=2)])
    found = [(group.method, group.role, group.shape) for group in depth.group_facts(tuned)]
    assert found == [(0, "q", (16, 16)), (1, "q", (16, 16)), (1, "k", (8, 16))]


def test_a_group_that_is_too_large_to_hold_has_no_rho(monkeypatch):
    tuned = attach(toy("llama"), [DoRA(rank=2, targets="q"), LoRA(rank=2, targets="q")])
    perturb(tuned)
    monkeypatch.setattr(depth, "MOST_DENSE", 2 * 16 * 16 - 1)
    dora, lora = depth.group_facts(tuned)
    assert dora.rho is None and lora.rho is not None
    monkeypatch.setattr(depth, "MOST_DENSE", 2 * 16 * 16)
    monkeypatch.setattr(depth, "CHUNK", 7)
    assert depth.group_facts(tuned)[0].rho == pytest.approx(dense_rho(changes_by_role(attach_like(tuned))["q"]), rel=1e-5)


def attach_like(tuned):
    """The same deltas of the first method alone."""
    alone = attach(toy("llama"), [tuned.attached()[0].method])
    own = {key: tensor for key, tensor in tuned.delta_state().items() if key.startswith("0:")}
    alone.load_delta_state(own)
    return alone


def test_the_residual_is_the_worst_of_the_layers(monkeypatch):
    tuned = attach(toy("llama"), [LoRA(rank=2, targets="q"), BitFit(targets="q")])
    told = {id(delta): 0.25 * site.layer for site, delta in tuned.attached()[0].attachment.deltas.items()}
    monkeypatch.setattr(LowRankDelta, "orthogonality", lambda delta: told[id(delta)])
    assert [group.residual for group in depth.group_facts(tuned)] == [0.25, None]


def test_they_are_saved_and_read_and_a_record_without_them_reads_too(tmp_path):
    tuned = attach(toy("llama"), [LoRA(rank=2)])
    perturb(tuned)
    native.save(tuned, tmp_path / "d")
    assert read_record(tmp_path / "d").groups == depth.group_facts(tuned)
    values = json.loads((tmp_path / "d" / RECORD).read_text())
    for key in ("groups", "shared"):
        values.pop(key)
    (tmp_path / "d" / RECORD).write_text(json.dumps(values))
    assert read_record(tmp_path / "d").groups == [] == read_record(tmp_path / "d").shared
    native.load(toy("llama"), tmp_path / "d")


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.id)
def test_sites_and_shared_modules_sum_up_to_the_deltas_parameters(case, tmp_path):
    tuned = case.tuned()
    native.save(tuned, tmp_path / "d")
    record = delta_file_facts(tmp_path / "d").record
    assert sum(part.parameters for part in (*record.sites, *record.shared)) == sum(tuned.counts())


def test_a_shared_network_is_told_apart_from_its_sites(tmp_path):
    tuned = attach(toy("llama"), [Prefix(length=2, reparametrise=5)])
    native.save(tuned, tmp_path / "d")
    record = delta_file_facts(tmp_path / "d").record
    assert [(shared.name, shared.parameters) for shared in record.shared] == [("network", sum(tuned.counts()))]
    assert all(site.parameters == 0 for site in record.sites)
