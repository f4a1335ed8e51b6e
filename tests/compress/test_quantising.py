"""Rounding, GPTQ against the textbook's slow loop, and corrections of the error."""

import pytest
import torch

from deltaloom.compact import FactoredLinear, QuantisedLinear, codec_from
from deltaloom.compact.codecs.int4 import Int4
from deltaloom.compact.face import affine_weight
from deltaloom.compress._calibration import calibrated
from deltaloom.compress._gptq import inverse_factor, rounded
from deltaloom.compress.base import weight_bytes
from deltaloom.compress.gptq import GPTQ
from deltaloom.compress.quantise import Quantise
from deltaloom.compress.svd import SVD
from deltaloom.errors import NonFiniteError, RefusedError, SettingsError
from tests.compress.pieces import LAYOUTS, compressed, outputs, sketched, work
from tests.toys import toy

CODECS = ["int8", "nf4", "int4", {"codec": "int4", "group": 8}]


def case(d_out=6, d_in=24, samples=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator)
    mix = torch.randn(d_in, d_in, generator=generator) * torch.logspace(0, -1, d_in)
    inputs = torch.randn(samples, d_in, generator=generator) @ mix
    return weight, (inputs.T @ inputs).double()


def textbook(weight, gram, codec, damping, order):
    """Optimal brain quantisation in a fixed order, with the inverse of what is left of H made anew for each column."""
    d_in = weight.shape[1]
    h = gram + damping * gram.diagonal().mean() * torch.eye(d_in, dtype=torch.float64)
    w = weight.double().clone()
    places = list(range(d_in)) if order == "natural" else sorted(range(d_in), key=lambda j: -float(gram[j, j]))
    grids = {group: codec.grid(weight[:, group * codec.group:(group + 1) * codec.group]) for group in range(codec.groups(d_in))}
    codes = torch.empty_like(w)
    for position, j in enumerate(places):
        group, left = j // codec.group, places[position:]
        if order == "natural" and j % codec.group == 0:
            grids[group] = codec.grid(w[:, j:j + codec.group])
        scale, zero = (each.double() for each in grids[group])
        inverse = torch.linalg.inv(h[left][:, left])
        codes[:, j] = ((w[:, j:j + 1] / scale).round() + zero).clamp(0, 15)[:, 0]
        error = (w[:, j] - (scale * (codes[:, j:j + 1] - zero))[:, 0]) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
    return codes, torch.cat([grids[group][0] for group in sorted(grids)], 1), torch.cat([grids[g][1] for g in sorted(grids)], 1)


@pytest.mark.parametrize("order", ["natural", "energy"])
@pytest.mark.parametrize("d_in,group", [(24, 8), (24, 24), (26, 8), (300, 64), (300, 100)])
def test_gptq_is_the_textbooks_slow_loop(order, d_in, group):
    weight, gram = case(4, d_in, samples=2 * d_in)
    codec = Int4(group=group)
    found, expected = rounded(weight, gram, codec, 0.01, order), textbook(weight, gram, codec, 0.01, order)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=0)


@pytest.mark.parametrize("order", ["natural", "energy"])
@pytest.mark.parametrize("seed", range(5))
def test_gptq_loses_less_of_the_outputs_than_the_nearest_codes(order, seed):
    weight, gram = case(8, 32, samples=64, seed=seed)
    codec = Int4(group=16)
    nearest = weight.double() - codec.decode(codec.encode(weight), 8, 32, torch.float64)
    calibrated_codes = codec.pack(*rounded(weight, gram, codec, 0.01, order))
    chosen = weight.double() - codec.decode(calibrated_codes, 8, 32, torch.float64)
    assert float((chosen @ gram @ chosen.T).trace()) < 0.8 * float((nearest @ gram @ nearest.T).trace())


def test_the_factor_is_of_the_damped_inverse_and_dead_inputs_stay_for_themselves():
    _, gram = case()
    upper = inverse_factor(gram, 0.05)
    damped = gram + 0.05 * gram.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(damped))
    assert torch.equal(upper, upper.triu())
    gram[3], gram[:, 3] = 0, 0
    weight, _ = case()
    codes, scales, zeros = rounded(weight, gram, Int4(group=24), 0.01, "energy")
    own = Int4(group=24)
    assert torch.equal(codes[:, 3], own.pack(codes, scales, zeros) and ((weight[:, 3] / scales[:, 0]).round() + zeros[:, 0])
                       .clamp(0, 15).double())
    assert inverse_factor(torch.ones(5, 5).double(), 0.0).isfinite().all()  # singular: damped until it is not
    with pytest.raises(NonFiniteError, match="inverse"):
        inverse_factor(torch.full((3, 3), float("inf")).double(), 0.01)


def test_a_row_of_zeros_stays_zero():
    weight, gram = case()
    weight[2] = 0
    codec = Int4(group=8)
    found = codec.decode(codec.pack(*rounded(weight, gram, codec, 0.01, "natural")), 6, 24, torch.float32)
    assert not found[2].any() and found.isfinite().all()


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounding_is_the_codecs_and_sizes_are_the_sketchs(layout, codec):
    compressor = Quantise(codec=codec)
    done, facts = compressed(compressor, layout)
    before, made = toy(layout), codec_from(codec)
    assert weight_bytes(done.model) == weight_bytes(sketched(compressor, layout)) < weight_bytes(before)
    assert outputs(done.model, layout).isfinite().all()
    for record in facts.layers:
        weight = affine_weight(before.get_submodule(record["layer"])).detach()
        layer = done.model.get_submodule(record["layer"])
        assert isinstance(layer, QuantisedLinear)
        expected = made.decode(made.encode(weight), *weight.shape, torch.float32)
        assert torch.equal(layer.dequantised(), expected)
        error = float((weight - expected).double().norm() / weight.double().norm())
        assert record["weight_error"] == pytest.approx(error, rel=1e-6)
        assert record["bits"] == pytest.approx(8 * made.encoded_bytes(*weight.shape) / weight.numel())
    assert len(facts.layers) == len(compressor.sites(before))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_calibrated_codes_beat_the_nearest_ones_on_the_outputs_of_the_first_block(layout):
    compressor = GPTQ(group=8)
    done, facts = compressed(compressor, layout, count=8)
    fresh = work(layout, count=8)
    assert weight_bytes(done.model) == weight_bytes(sketched(compressor, layout))
    records, codec = {record["layer"]: record for record in facts.layers}, Int4(group=8)
    nearest = chosen = 0.0
    block = next(calibrated(fresh.model, fresh.batches, compressor.sites(fresh.model), gram=True))
    for path, inputs in block.items():
        weight = affine_weight(fresh.model.get_submodule(path)).detach()
        errors = []
        rounding = codec.decode(codec.encode(weight), *weight.shape, torch.float32)
        for other in (rounding, done.model.get_submodule(path).dequantised()):
            change = (weight - other).double()
            errors.append(float((change @ inputs.product() @ change.T).trace()))
        total = float((weight.double() @ inputs.product() @ weight.double().T).trace())
        assert records[path]["output_error"] == pytest.approx((errors[1] / total) ** 0.5, rel=1e-3)
        nearest, chosen = nearest + errors[0], chosen + errors[1]
    assert chosen < 0.9 * nearest


@pytest.mark.parametrize("compressor", [Quantise(codec="nf4"), GPTQ()], ids=str)
def test_what_is_compressed_already_is_refused(compressor):
    done = work("llama")
    SVD(ratio=0.6, targets="mlp").apply(done)
    assert any(isinstance(layer, FactoredLinear) for layer in done.model.modules())
    with pytest.raises(RefusedError, match="already"):
        compressor.sketch(done.model)


def test_bad_settings_are_refused():
    for wrong in ("int5", {"codec": "nf4", "groups": 3}, {"group": 3}, {"codec": "int4", "group": 3}):
        with pytest.raises(SettingsError, match="codec"):
            Quantise(codec=wrong)
    for wrong in ({"group": 3}, {"damping": -1}, {"order": "random"}):
        with pytest.raises(SettingsError):
            GPTQ(**wrong)
