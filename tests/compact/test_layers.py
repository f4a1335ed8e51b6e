"""Compact layers against the dense layer of their dequantised weight: values, gradients, what they keep, forms."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from deltaloom.compact import CompactLinear, FactoredLinear, QuantisedLinear, codec_from, empty_layer
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.kernels.low_rank import Affine, low_rank_linear

KINDS = ["nf4", "int8", "int4", "nf4 corrected", "factored"]


def layer_of(kind: str, d_in: int = 24, d_out: int = 17, bias: bool = True, dtype: torch.dtype = torch.float32) -> CompactLinear:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    own = draw(d_out) if bias else None
    if kind == "factored":
        return FactoredLinear(draw(3, d_in), draw(d_out, 3), own)
    correction = (draw(d_out, 2), draw(2, d_in)) if "corrected" in kind else None
    return QuantisedLinear.from_weight(draw(d_out, d_in), own, codec_from(kind.split()[0]), correction)


def dense_of(layer: CompactLinear) -> nn.Linear:
    dense = nn.Linear(layer.d_in, layer.d_out, bias=layer.bias is not None, dtype=torch.float64).requires_grad_(False)
    with torch.no_grad():
        dense.weight.copy_(layer.dequantised(torch.float64))
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
    return dense


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_dense_layer(kind, bias):
    layer, dense = layer_of(kind, bias=bias), dense_of(layer_of(kind, bias=bias))
    for rows in ((4,), (2, 3), ()):
        x = torch.randn(*rows, 24, dtype=torch.float64, requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        y, expected = layer(x), dense(twin)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.product(x.detach()), y.detach(), rtol=0, atol=0)
        g = torch.randn_like(y)
        y.backward(g)
        expected.backward(g)
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.product_transposed(g), twin.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    layer = layer_of(kind, 5, 4)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_another_weight_or_bias_takes_gradients(kind):
    layer = layer_of(kind)
    x = torch.randn(4, 24, requires_grad=True)
    bias = torch.randn(17, requires_grad=True)
    weight = layer.dequantised(torch.float32).requires_grad_()
    layer.replaced(x, None, bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((17,), 4.0))
    y = layer.replaced(x, weight, None)
    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(17, 24))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_grows_with_the_rows_is_kept(kind):
    layer = layer_of(kind)
    own = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: list[Tensor] = []
    x = torch.randn(50, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in own and t.numel() >= 50] == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_low_rank_function_takes_it(kind):
    layer = layer_of(kind)
    assert isinstance(layer, Affine)
    x, down, up = (torch.randn(*s, requires_grad=True) for s in ((5, 24), (3, 24), (17, 3)))
    scale = torch.rand(3, requires_grad=True)
    y = low_rank_linear(layer, x, down, scale, up)
    torch.testing.assert_close(y, layer(x) + ((x @ down.T) * scale) @ up.T, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    expected = layer.dequantised().sum(0) + ((up * scale) @ down).sum(0)
    torch.testing.assert_close(x.grad, expected.expand(5, 24), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_moving_to_another_type_keeps_what_is_stored(kind):
    layer = layer_of(kind)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.to(torch.bfloat16)
    assert layer.dtype == layer.weight.dtype == torch.bfloat16 and layer.bias.dtype == torch.bfloat16
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
    assert layer.dequantised().dtype == torch.bfloat16
    assert layer(torch.randn(2, 24).bfloat16()).dtype == torch.bfloat16


def test_autocast_as_of_a_plain_linear_layer():
    layer = layer_of("int8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(3, 24, requires_grad=True))
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_form_makes_an_empty_layer_of_the_same_tensors(kind):
    for bias in (True, False):
        layer = layer_of(kind, bias=bias)
        again = empty_layer(json.loads(json.dumps(layer.form())), torch.float32, "cpu")
        shapes = {name: (t.shape, t.dtype) for name, t in layer.state_dict().items()}
        assert {name: (t.shape, t.dtype) for name, t in again.state_dict().items()} == shapes
        again.load_state_dict(layer.state_dict())
        x = torch.randn(3, 24)
        assert torch.equal(again(x), layer(x)) and again.form() == layer.form()
        meta = empty_layer(layer.form(), torch.bfloat16)
        assert all(t.is_meta for t in meta.state_dict().values()) and meta.stored_bytes() > 0


GOOD = {"form": "quantised", "d_in": 4, "d_out": 3, "bias": True, "codec": "nf4", "correction": 0}


@pytest.mark.parametrize("change", [
    {"form": "dense"}, {"form": None}, {"d_in": 0}, {"d_in": -1}, {"d_in": 2 ** 40}, {"d_in": 4.0}, {"d_in": "4"}, {"d_in": True},
    {"bias": 1}, {"codec": "nf5"}, {"codec": ["nf4"]}, {"group": 3}, {"correction": -1}, {"correction": None},
    {"more": 1}], ids=str)
def test_records_that_are_no_forms(change):
    with pytest.raises(SettingsError):
        empty_layer(GOOD | change, torch.float32)
    assert empty_layer(GOOD, torch.float32).d_in == 4
    for wrong in (None, 3, "quantised", [GOOD], {}):
        with pytest.raises(SettingsError):
            empty_layer(wrong, torch.float32)


def test_tensors_that_do_not_belong_together():
    weight, codec = torch.randn(6, 8), codec_from("nf4")
    tensors = codec.encode(weight)
    with pytest.raises(RefusedError, match="codes: missing"):
        QuantisedLinear.from_tensors({k: v for k, v in tensors.items() if k != "codes"}, 8, 6, None, codec, torch.float32)
    with pytest.raises(RefusedError, match="codes"):
        QuantisedLinear.from_tensors(tensors, 8, 7, None, codec, torch.float32)
    with pytest.raises(RefusedError, match="right"):
        QuantisedLinear.from_weight(weight, None, codec, (torch.zeros(6, 2), torch.zeros(3, 8)))
    with pytest.raises(RefusedError):
        FactoredLinear(torch.zeros(2, 8), torch.zeros(6, 3))
    with pytest.raises(RefusedError):
        FactoredLinear(torch.zeros(2, 8), torch.zeros(6, 2), torch.zeros(5))


def test_the_weight_is_a_shape_and_a_type_without_values():
    layer = layer_of("nf4", dtype=torch.bfloat16)
    assert layer.weight.shape == (17, 24) and layer.weight.dtype == torch.bfloat16 and layer.weight.is_meta
    assert (layer.in_features, layer.out_features) == (24, 17)
    assert "nf4" in repr(layer) and sorted(name for name, _ in layer.named_parameters()) == ["bias"]


def test_factors_train_where_they_are_told_to():
    layer = layer_of("factored")
    layer.left.requires_grad_()
    layer(torch.randn(3, 24)).sum().backward()
    assert layer.left.grad is not None and bool(layer.left.grad.any())
