"""Codecs: bitsandbytes' values for NF4, loops as oracle for the rest, sizes, every shape, and what is refused."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaloom.compact import codec_from, codec_names, codec_record
from deltaloom.compact.codecs.int4 import Int4
from deltaloom.compact.codecs.nf4 import LEVELS, Nf4
from deltaloom.errors import RefusedError, SettingsError

SHAPES = [(64, 64), (33, 7), (1, 1), (1, 200), (200, 1), (300, 577)]


def random_weight(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)


@pytest.fixture(scope="module")
def functional():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("bitsandbytes")
    before, torch._dynamo.config.disable = torch._dynamo.config.disable, True  # it would compile what it has no kernel for
    yield module.functional
    torch._dynamo.config.disable = before


def their_nf4(functional, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(codes, scales, steps, mean, dequantised weight) of bitsandbytes, by its kernels in torch: its own CPU kernel does not
    always choose the nearest of two values of the map of scales (1 in 600)."""
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    mean = state.absmax.mean()
    plain = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    operator = torch.ops.bitsandbytes.quantize_blockwise.default
    scales, steps = operator.redispatch(plain, state.absmax - mean, functional.create_dynamic_map(), 256)
    state.nested, state.offset, state.absmax = True, mean, scales
    state.state2 = functional.QuantState(absmax=steps, code=functional.create_dynamic_map(), blocksize=256,
                                         dtype=torch.float32)
    return codes.view(-1), scales, steps, mean, functional.dequantize_4bit(codes, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_is_that_of_bitsandbytes(functional, shape, dtype):
    weight, codec = random_weight(*shape).to(dtype), Nf4()
    found = codec.encode(weight)
    codes, scales, steps, mean, theirs = their_nf4(functional, weight)
    assert torch.equal(found["codes"], codes)
    assert torch.equal(found["scales"], scales)
    torch.testing.assert_close(found["steps"], steps, rtol=0, atol=1e-37)
    torch.testing.assert_close(found["mean"], mean.reshape(1), rtol=0, atol=0)
    torch.testing.assert_close(codec.decode(found, *shape, torch.float32).to(dtype), theirs, rtol=0, atol=1e-6)


def test_bitsandbytes_own_double_quantisation_differs_at_ties_only(functional):
    weight = random_weight(512, 512)
    _, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = Nf4().encode(weight)
    apart = (ours["scales"].int() - state.absmax.int()).abs()
    assert int(apart.max()) <= 1
    assert float(apart.float().mean()) < 0.005


def test_nf4_decodes_level_by_level():
    weight = random_weight(5, 70)
    codec = Nf4()
    tensors = codec.encode(weight)
    exact = codec.decode(tensors, 5, 70, torch.float64).view(-1)
    from deltaloom.compact.codecs.nf4 import dynamic_map
    table = dynamic_map(torch.device("cpu"))
    for index in range(350):
        byte = int(tensors["codes"][index // 2])
        level = LEVELS[byte & 15 if index % 2 else byte >> 4]
        block = index // 64
        scale = float(table[int(tensors["scales"][block])] * tensors["steps"][block // 256] + tensors["mean"])
        assert math.isclose(float(exact[index]), level * scale, rel_tol=1e-6, abs_tol=1e-9)


def test_int8_is_the_nearest_code_of_each_row():
    weight, codec = random_weight(7, 9), codec_from("int8")
    tensors = codec.encode(weight)
    decoded = codec.decode(tensors, 7, 9, torch.float32)
    for row in range(7):
        step = float(weight[row].abs().max()) / 127
        assert float((decoded[row] - weight[row]).abs().max()) <= step / 2 * (1 + 1e-5)
        assert int(tensors["codes"][row].abs().max()) == 127


@pytest.mark.parametrize("group", [2, 6, 64, 128])
def test_int4_is_the_nearest_point_of_each_groups_grid(group):
    weight, codec = random_weight(5, 130), Int4(group=group)
    decoded = codec.decode(codec.encode(weight), 5, 130, torch.float32)
    for row in range(5):
        for start in range(0, 130, group):
            part = weight[row, start:start + group]
            low, high = min(0.0, float(part.min())), max(0.0, float(part.max()))
            step = (high - low) / 15 * (1 + 2 ** -7)  # the scale is rounded up to bfloat16
            assert float((decoded[row, start:start + group] - part).abs().max()) <= step * (1 + 1e-5)


def test_int4_stores_codes_that_were_chosen_elsewhere():
    codec = Int4(group=4)
    codes = torch.randint(0, 16, (3, 11))
    scales, zeros = torch.rand(3, 3).bfloat16(), torch.randint(0, 16, (3, 3))
    decoded = codec.decode(codec.pack(codes, scales, zeros), 3, 11, torch.float32)
    for row in range(3):
        for column in range(11):
            expected = float(scales[row, column // 4]) * int(codes[row, column] - zeros[row, column // 4])
            assert math.isclose(float(decoded[row, column]), expected, rel_tol=1e-6, abs_tol=1e-9)


@pytest.mark.parametrize("wrong", [torch.full((3, 11), 16), torch.full((3, 11), -1), torch.full((3, 11), 0.5)], ids=str)
def test_int4_refuses_codes_that_are_none(wrong):
    with pytest.raises(RefusedError, match="whole numbers"):
        Int4(group=4).pack(wrong, torch.ones(3, 3), torch.zeros(3, 3))
    with pytest.raises(RefusedError, match="do not fit"):
        Int4(group=4).pack(torch.zeros(3, 11), torch.ones(3, 2), torch.zeros(3, 2))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(codec_names()), st.integers(1, 40), st.integers(1, 150), st.sampled_from(["bfloat16", "float32"]),
       st.sampled_from([1e-30, 1.0, 1e30]))
def test_every_shape_goes_there_and_back(name, d_out, d_in, kind, size):
    codec, dtype = codec_from(name), getattr(torch, kind)
    weight = (random_weight(d_out, d_in) * size).to(dtype)
    tensors = codec.encode(weight)
    assert {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()} == codec.shapes(d_out, d_in)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == codec.encoded_bytes(d_out, d_in)
    decoded = codec.decode(tensors, d_out, d_in, dtype)
    assert decoded.shape == weight.shape and decoded.dtype == dtype and bool(decoded.isfinite().all())
    assert float((decoded.double() - weight.double()).norm()) <= 0.3 * float(weight.double().norm())


@pytest.mark.parametrize("name", codec_names())
def test_more_than_one_chunk_decodes_as_one(name, monkeypatch):
    codec, weight = codec_from(name), random_weight(37, 130)
    whole = codec.encode(weight)
    decoded = codec.decode(whole, 37, 130, torch.float32)
    for place in ("nf4", "int8", "int4"):
        monkeypatch.setattr(f"deltaloom.compact.codecs.{place}.CHUNK", 256)
    parts = codec.encode(weight)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert torch.equal(codec.decode(whole, 37, 130, torch.float32), decoded)


@pytest.mark.parametrize("name", codec_names())
def test_zeros_stay_zeros(name):
    codec, weight = codec_from(name), random_weight(4, 130)
    weight[1:] = 0.0
    weight[0, 64:] = 0.0
    decoded = codec.decode(codec.encode(weight), 4, 130, torch.float32)
    assert not bool(decoded[2:].any()) and not bool(codec.decode(codec.encode(weight * 0), 4, 130, torch.float32).any())


@pytest.mark.parametrize("name", codec_names())
@pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(0, 4), torch.ones(2, 2, dtype=torch.long),
                                    torch.tensor([[1.0, float("nan")]]), torch.tensor([[float("inf"), 1.0]])],
                         ids=["vector", "empty", "integers", "nan", "inf"])
def test_what_is_no_weight_is_refused(name, weight):
    with pytest.raises(RefusedError):
        codec_from(name).encode(weight)


def test_bytes_a_parameter_at_the_sizes_of_real_models():
    for shape in ((576, 576), (192, 576), (1536, 576), (576, 1536), (4096, 11008)):
        assert codec_from("nf4").encoded_bytes(*shape) <= 0.52 * math.prod(shape)
        assert codec_from("int8").encoded_bytes(*shape) <= 1.01 * math.prod(shape)


def test_records_of_codecs():
    assert codec_from({"codec": "int4", "group": 32}) == Int4(group=32)
    assert codec_record(Int4(group=32)) == {"codec": "int4", "group": 32}
    for wrong in ("nf5", {"codec": "int4", "groups": 2}, {"codec": "int4", "group": 3}, {"group": 3}, 7, None):
        with pytest.raises(SettingsError):
            codec_from(wrong)
    with pytest.raises(SettingsError, match="nf4"):
        codec_from("nf5")
