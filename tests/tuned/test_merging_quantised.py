"""Merging deltas into compact layers: dense or requantised, the errors that are said, and back again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deltaloom.compact import CompactLinear, FactoredLinear, QuantisedLinear, codec_from
from deltaloom.compact.face import affine_weight, compact_layers, swap
from deltaloom.deltas.bitfit import BitFit
from deltaloom.deltas.dora import DoRA
from deltaloom.deltas.full import Full
from deltaloom.deltas.ia3 import IA3
from deltaloom.deltas.lora import LoRA
from deltaloom.models.compact import record_forms
from deltaloom.tuned import attach
from deltaloom.tuned.merging import logits_error
from tests.toys import LAYOUTS, quantised_toy, toy, toy_batch
from tests.tuned.test_merging import logits, shaken

METHODS = {"lora": [LoRA(rank=3)], "pissa": [LoRA(rank=3, init="pissa")], "dora": [DoRA(rank=3)],
           "parts": [LoRA(rank=2, targets=("q", "v"))], "full": [Full(targets="all-linear")], "bitfit": [BitFit()],
           "lora, ia3, bitfit": [LoRA(rank=2), IA3(), BitFit()], "lora over full": [LoRA(rank=2), Full(targets="mlp")]}


def other_layers(layout: str, kind: str) -> nn.Module:
    """The toy with its linears in another compact form."""
    model = toy(layout)
    for path in compact_layers(quantised_toy(layout, "int8")):
        old = model.get_submodule(path)
        weight = affine_weight(old).detach()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        if kind == "factored":
            layer: CompactLinear = FactoredLinear(s[:6, None] * v[:6], u[:, :6].contiguous(), old.bias)
        else:
            rest = weight - (u[:, :2] * s[:2]) @ v[:2]
            layer = QuantisedLinear.from_weight(rest, old.bias, codec_from("int4"), (u[:, :2] * s[:2], v[:2].contiguous()))
        swap(model, path, layer)
    record_forms(model)
    return model


def base(layout: str, form: str) -> nn.Module:
    return other_layers(layout, form) if form in ("factored", "corrected") else quantised_toy(layout, form)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "form"), [(name, "nf4") for name in METHODS]
                         + [("lora", "int8"), ("lora", "factored"), ("lora", "corrected"), ("full", "factored")])
def test_merged_equals_unmerged_and_unmerging_is_bit_exact(layout, name, form):
    model = base(layout, form)
    before = copy.deepcopy(model.state_dict())
    layers = {path: id(layer) for path, layer in compact_layers(model).items()}
    tuned = shaken(attach(model, METHODS[name]))
    apart = logits(tuned, layout)
    facts = tuned.merge()
    assert facts.tensors > 0 and facts.max_error < 1e-6 and facts.relative_error < 1e-7
    torch.testing.assert_close(logits(tuned, layout), apart, rtol=1e-4, atol=1e-4)
    with tuned.bare() as merged:
        torch.testing.assert_close(logits(merged, layout), apart, rtol=1e-4, atol=1e-4)
    assert logits_error(tuned, toy_batch(layout, labels=layout == "t5")) < 1e-3
    tuned.unmerge()
    assert torch.equal(logits(tuned, layout), apart)
    model = tuned.detach()
    assert {path: id(layer) for path, layer in compact_layers(model).items()} == layers
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("form", ["nf4", "int8", "corrected", "factored"])
@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_merging_is_dense_by_default_and_says_what_requantising_costs(layout, form):
    tuned = shaken(attach(base(layout, form), METHODS["lora"]), 0.02)
    apart = logits(tuned, layout)
    paths = {site.path for site, _ in tuned.pairs()}
    facts = tuned.merge()
    with tuned.bare() as merged:
        dense = {path: affine_weight(merged.get_submodule(path)).clone() for path in paths}
        assert not any(isinstance(merged.get_submodule(path), CompactLinear) for path in paths)
    assert facts.relative_error < 1e-6
    tuned.unmerge()
    facts = tuned.merge(requantise=True)
    with tuned.bare() as merged:
        layers = {path: merged.get_submodule(path) for path in paths}
        assert all(isinstance(layer, CompactLinear) for layer in layers.values())
        gaps = {path: (layer.dequantised() - dense[path]).double() for path, layer in layers.items()}
        together = logits(merged, layout)
    lost = sum(float(gap.square().sum()) for gap in gaps.values()) ** 0.5
    whole = sum(float(weight.double().square().sum()) for weight in dense.values()) ** 0.5
    assert facts.relative_error == pytest.approx(lost / whole, rel=1e-3) and facts.relative_error > 1e-4
    assert facts.max_error == pytest.approx(max(float(gap.abs().max()) for gap in gaps.values()), rel=1e-3)
    batch = toy_batch(layout, labels=False)
    assert logits_error(tuned, batch) == pytest.approx(float((together - apart).abs().max()), rel=1e-3)
    assert tuned.kept is not None and tuned.kept.requantised
    tuned.unmerge()
    assert torch.equal(logits(tuned, layout), apart)


def test_full_starts_at_the_dequantised_weight_in_the_layers_own_orientation():
    model = quantised_toy("gpt2", "nf4")
    exact = {path: layer.dequantised(torch.float32) for path, layer in compact_layers(model).items()}
    tuned = attach(model, [Full(targets="all-linear")])
    for site, delta in tuned.pairs():
        assert torch.equal(delta.override()["weight"].T, exact[site.path])


def test_a_full_delta_of_a_quantised_base_fits_the_dense_one(tmp_path):
    """Square layers of GPT-2 would take a transposed weight without a word."""
    from deltaloom.checkpoint import native

    tuned = shaken(attach(quantised_toy("gpt2", "int8"), [Full(targets="all-linear")]), 0.05)
    native.save(tuned, tmp_path / "d")
    with pytest.warns(UserWarning, match="stored as int8"):
        dense = native.load(toy("gpt2"), tmp_path / "d")
    torch.testing.assert_close(logits(dense, "gpt2"), logits(tuned, "gpt2"), rtol=1e-4, atol=1e-4)
