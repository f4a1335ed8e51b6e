"""A basis of several layers: stored once, best where that is known, worse than nothing nowhere."""

import copy
import json

import pytest
import torch

from deltaloom.compact import FactoredLinear
from deltaloom.compact.face import affine_weight, parameter_count
from deltaloom.compress._calibration import calibrated
from deltaloom.compress.base import weight_bytes
from deltaloom.compress.drop_layers import DropLayers
from deltaloom.compress.shared_basis import SharedBasis
from deltaloom.errors import CheckpointError, RefusedError, SettingsError
from deltaloom.linalg.matrix import refitted_left
from deltaloom.models import describe
from deltaloom.models.compact import CompactConfig, record_forms, shared_factors
from tests.compress.pieces import LAYOUTS, compressed, meta, outputs, shapes, sketched, work
from tests.toys import toy


def layers_of(model):
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, FactoredLinear)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [0.5, 0.8])
def test_sizes_are_the_sketchs_and_a_basis_counts_once(layout, ratio):
    compressor = SharedBasis(ratio=ratio)
    done, facts = compressed(compressor, layout)
    sites = compressor.sites(toy(layout))
    total = sum(site.d_in * site.d_out for site in sites)
    assert weight_bytes(done.model) == weight_bytes(sketched(compressor, layout))
    saved = weight_bytes(toy(layout)) - weight_bytes(done.model)
    kept = facts.figures["target_parameters_after"]
    assert saved == 4 * (total - kept) and (ratio - 0.15) * total < kept <= ratio * total
    assert sum(record["kept"] * site.d_in * site.d_out for record, site in zip(
        sorted(facts.layers, key=lambda each: each["layer"]), sorted(sites, key=lambda each: each.path), strict=True)
        ) == pytest.approx(kept)
    assert parameter_count(done.model) == sum(parameter.numel() for parameter in done.model.parameters())
    assert outputs(done.model, layout).isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_that_read_share_the_basis_of_inputs_and_those_that_write_that_of_outputs(layout):
    done, _ = compressed(SharedBasis(), layout)
    layers = layers_of(done.model)
    pairs = 0
    for site in SharedBasis().sites(toy(layout)):
        other = site.path.replace(f"{site.stack}.0.", f"{site.stack}.1.")
        if site.layer == 0 and other in layers:
            first, second = layers[site.path], layers[other]
            writes = site.role in ("o", "down")
            assert (first.left is second.left) == writes and (first.right is second.right) == (not writes)
            pairs += 1
    assert pairs >= 4


def test_the_basis_of_outputs_is_the_best_one_and_coefficients_fit_each_layers_own_inputs():
    fresh = work("llama", dtype=torch.float64)
    compressor = SharedBasis(ratio=0.6, targets=("o", "up"), ridge=0)
    block = next(calibrated(fresh.model, fresh.batches, compressor.sites(fresh.model), gram=True, span=2))
    done = work("llama", dtype=torch.float64)
    compressor.apply(done)
    layers = layers_of(done.model)
    paths = [f"model.layers.{index}.self_attn.o_proj" for index in range(2)]
    outer, weights = [], [affine_weight(fresh.model.get_submodule(path)).detach() for path in paths]
    for path, weight in zip(paths, weights, strict=True):
        product = weight @ block[path].product() @ weight.T
        outer.append(product / product.trace())
    rank = layers[paths[0]].rank
    missing = sum(float((change @ block[path].product() @ change.T).trace() / (w @ block[path].product() @ w.T).trace())
                  for path, w in zip(paths, weights, strict=True) for change in [w - layers[path].dequantised()])
    assert missing == pytest.approx(float(torch.linalg.eigvalsh(sum(outer))[:-rank].sum()), rel=1e-6)
    up = "model.layers.1.mlp.up_proj"
    weight, gram, right = affine_weight(fresh.model.get_submodule(up)).detach(), block[up].product(), layers[up].right
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp(min=0).sqrt()
    best = torch.linalg.lstsq((right @ root).T, (weight @ root).T).solution.T
    torch.testing.assert_close(layers[up].left, best, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(refitted_left(weight, right, gram), best, rtol=1e-5, atol=1e-6)


def test_layers_that_are_alike_lose_nothing_where_single_ones_would():
    done = work("llama", dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(9, 16, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        for layer in done.model.model.layers:  # rank 9 > 16 * 16 * 0.8 / 32
            layer.self_attn.q_proj.weight.copy_(torch.randn(16, 9, generator=generator, dtype=torch.float64) @ basis / 5)
    before = outputs(done.model, "llama")
    SharedBasis(ratio=0.9, targets="q", ridge=0).apply(done)
    torch.testing.assert_close(outputs(done.model, "llama"), before, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shared_factors_are_saved_once_and_shared_again(layout, tmp_path):
    done, _ = compressed(SharedBasis(ratio=0.6), layout)
    expected = outputs(done.model, layout)
    record_forms(done.model)
    done.model.save_pretrained(tmp_path / "m")
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert size < weight_bytes(done.model) + 30_000  # the header
    again = type(done.model).from_pretrained(tmp_path / "m").eval()
    assert torch.equal(outputs(again, layout), expected)
    assert shared_factors(again) == shared_factors(done.model) != {}
    assert weight_bytes(again) == weight_bytes(done.model)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").stat().st_size == size
    if layout in ("llama", "gpt2"):
        facts = describe(tmp_path / "m")
        assert facts.parameters == parameter_count(done.model) and facts.weight_bytes == weight_bytes(done.model)
    twice = copy.deepcopy(again)
    assert weight_bytes(twice) == weight_bytes(again)


def test_dropping_the_first_block_leaves_the_basis_with_the_second(tmp_path):
    done, _ = compressed(SharedBasis(ratio=0.6), "llama")
    kept = done.model.model.layers[1].self_attn.q_proj
    right = kept.right.clone()
    DropLayers(keep=1, choose="uniform").apply(done)
    survivor = done.model.model.layers[0].self_attn.q_proj
    record_forms(done.model)
    done.model.save_pretrained(tmp_path / "m")
    again = type(done.model).from_pretrained(tmp_path / "m")
    assert torch.equal(again.model.layers[0].self_attn.q_proj.right, survivor.right)
    assert survivor is not kept or torch.equal(survivor.right, right)
    assert shared_factors(again) == {}


def test_a_damaged_record_of_what_is_shared_is_refused(tmp_path):
    done, _ = compressed(SharedBasis(ratio=0.6), "llama")
    record_forms(done.model)
    done.model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    good = json.loads(path.read_text())
    q, down = "model.layers.1.self_attn.q_proj.right", "model.layers.0.mlp.down_proj.left"
    for tied in ({q: down}, {q: q}, {"model.norm.weight": q}, {q: "nothing"}, {q: "model.layers.0.self_attn.q_proj.bias"}):
        path.write_text(json.dumps(good | {"quantization_config": good["quantization_config"] | {"tied": tied}}))
        with pytest.raises(CheckpointError, match="tied does not fit"):
            type(done.model).from_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError):
        CompactConfig(tied=["q"])
    with pytest.raises(CheckpointError):
        CompactConfig(tied={"q": 3})


def test_bad_input_is_refused_and_changes_nothing():
    model = meta("llama")
    before = shapes(model)
    with pytest.raises(RefusedError, match="no rank"):
        SharedBasis(ratio=0.02).sketch(model)
    assert shapes(model) == before
    for wrong in ({"ratio": 1.0}, {"blocks": 1}, {"ridge": -1}):
        with pytest.raises(SettingsError):
            SharedBasis(**wrong)
