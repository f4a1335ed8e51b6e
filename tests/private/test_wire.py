"""Frames, schema and codecs: what is sent arrives, what is malformed is refused with its reason."""

from __future__ import annotations

import dataclasses
import struct
import zlib

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.errors import NonFiniteError, RefusedError
from deltaloom.private.messages import GradientRequest, Key, LossRequest
from deltaloom.private.refused import REASONS, Refused
from deltaloom.private.round_messages import AnswerRequest, Phase
from deltaloom.private.wire.codecs import codec_named, codec_names
from deltaloom.private.wire.convert import decode_message
from deltaloom.private.wire.frame import CHUNK, MAGIC, PREAMBLE, Assembler, encode_frame
from deltaloom.private.wire.schema import check_header
from tests.private.wired import (
    BOUNDS,
    WIDTH,
    assemble,
    assert_same,
    frame_of,
    loss_request,
    outputs_request,
    received,
    replies,
    requests,
    rows,
)


def named(message) -> str:
    return type(message).__name__


@pytest.mark.parametrize("message", requests(), ids=named)
def test_a_request_arrives_as_it_was_sent(message):
    assert_same(received(message, asks=True), message)


@pytest.mark.parametrize("message", replies(), ids=named)
def test_a_reply_arrives_as_it_was_sent(message):
    assert_same(received(message, asks=False), message)


@pytest.mark.parametrize("message", [requests()[1], replies()[2]], ids=named)
def test_no_kind_comes_from_the_wrong_side(message):
    with pytest.raises(Refused) as refusal:
        received(message, asks=isinstance(message, tuple(type(one) for one in replies())))
    assert refusal.value.reason == "schema"


@pytest.mark.parametrize("size", [CHUNK, 4096, 1000])
def test_the_size_of_chunks_does_not_matter(size):
    message = loss_request(lengths=(100, 90))
    data = frame_of(message)
    assert bytes(assemble(data, asks=True, size=size).body) == bytes(assemble(data, asks=True).body)


def test_every_codec_is_found_by_its_name():
    assert codec_names() == ["bf16", "fp32", "int8"]
    assert [codec_named(name).name for name in codec_names()] == codec_names()


@pytest.mark.parametrize("name", codec_names())
@given(rows=st.integers(0, 5), columns=st.integers(0, 9), scale=st.sampled_from([0.0, 1e-40, 1e-3, 1.0, 1e30]),
       seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_a_codec_errs_by_no_more_than_its_rounding(name, rows, columns, scale, seed):
    codec = codec_named(name)
    tensor = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    raw = codec.encode(tensor)
    assert len(raw) == codec.size((rows, columns))
    view = memoryview(bytearray(raw))
    assert codec.finite(view, (rows, columns))
    back = codec.decode(view, (rows, columns))
    assert back.shape == tensor.shape and back.dtype == torch.float32
    largest = tensor.abs().amax(dim=1, keepdim=True) if columns else torch.zeros(rows, 1)
    bound = {"fp32": 0 * tensor, "bf16": tensor.abs() * 2 ** -8 + 1e-40,
             "int8": (largest / 127 * 0.5000001 + 1e-40).expand(rows, columns)}[name]
    assert bool(((back - tensor).abs() <= bound).all())


@pytest.mark.parametrize("name", codec_names())
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_codec_sends_nothing_that_is_not_finite(name, bad):
    tensor = torch.ones(2, 3)
    tensor[1, 2] = bad
    with pytest.raises(NonFiniteError):
        codec_named(name).encode(tensor)


def test_what_bfloat16_cannot_hold_is_not_sent():
    with pytest.raises(NonFiniteError, match="bfloat16"):
        codec_named("bf16").encode(torch.full((1, 1), torch.finfo(torch.float32).max))


@pytest.mark.parametrize(("codec", "per_token"),
                         [("fp32", lambda h: 4 * h), ("bf16", lambda h: 2 * h), ("int8", lambda h: h + 4)])
@pytest.mark.parametrize("width", [384, 576])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_training_frame_has_its_codecs_bytes_a_token_within_two_percent(codec, per_token, width, direction):
    """Whole frames are counted, with header, places, labels (all tokens learned) and checksum, at 8 rows of 64 tokens."""
    tokens = 8 * 64
    hidden = rows((64,) * 8, width=width)
    every = torch.arange(tokens)
    request = LossRequest(Key(100, 3), hidden, every, every + 48_000)
    reply = replies()[2]
    message = request if direction == "up" else dataclasses.replace(reply, gradient=hidden.hidden)
    size = len(encode := frame_of(message, codec))
    assert encode[:4] == MAGIC
    assert per_token(width) * tokens <= size <= 1.02 * per_token(width) * tokens


def test_negative_labels_are_not_sent():
    with pytest.raises(RefusedError, match="out of range"):
        frame_of(dataclasses.replace(loss_request(), labels=torch.tensor([0, 1, -100])))


def reason_of(data: bytes, **options) -> str:
    with pytest.raises(Refused) as refusal:
        frame = assemble(data, asks=True, **options)
        decode_message(frame.header, frame.body, BOUNDS)
    assert refusal.value.reason in REASONS
    return refusal.value.reason


def with_preamble(data: bytes, **changes) -> bytes:
    names = ("magic", "version", "flags", "header", "body")
    fields = dict(zip(names, PREAMBLE.unpack_from(data), strict=True)) | changes
    return PREAMBLE.pack(*(fields[name] for name in names)) + data[PREAMBLE.size:]


def test_a_malformed_frame_is_refused_with_its_reason():
    good = frame_of(loss_request())
    assert assemble(good, asks=True) is not None
    assert reason_of(b"HTTP" + good[4:]) == "magic"
    assert reason_of(with_preamble(good, version=2)) == "version"
    assert reason_of(with_preamble(good, flags=1)) == "version"
    assert reason_of(with_preamble(good, body=2 ** 60)) == "oversized"
    assert reason_of(with_preamble(good, header=2 ** 31)) == "oversized"
    assert reason_of(with_preamble(good, body=PREAMBLE.unpack_from(good)[4] + 8)) == "shape"
    assert reason_of(good[:10]) == "truncated"
    assert reason_of(good[:60]) == "truncated"
    assert reason_of(good[:-1]) == "truncated"
    assert reason_of(good[:-30]) == "truncated"
    assert reason_of(good + b"x") == "oversized"
    assert reason_of(good[:-5] + b"\x55" + good[-4:]) == "checksum"
    assert reason_of(good[:-1] + bytes([good[-1] ^ 1])) == "checksum"


def test_an_empty_chunk_and_one_above_the_limit_are_refused():
    assembler = Assembler(lambda header: (header, 0), 100)
    for chunk, reason in ((b"", "truncated"), (bytes(CHUNK + 1), "oversized")):
        with pytest.raises(Refused) as refusal:
            assembler.feed(chunk)
        assert refusal.value.reason == reason


def raw_frame(packed: bytes, body: bytes = b"") -> bytes:
    start = PREAMBLE.pack(MAGIC, 1, 0, len(packed), len(body)) + packed
    return start + body + struct.pack("<I", zlib.crc32(body, zlib.crc32(start)))


@pytest.mark.parametrize("packed", [
    b"", b"\xc0", b"\x01", b"\x90", b"\xc1", b"\x91" * 2000, b"\x82\xa1a\x01\xa1a\x02", b"\x81\x01\x02", b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff", b"\xc7\x01\x05x", b"\xd6\xff\0\0\0\1", b"\x80\x80", b"\x81\xa1\xff\x01", b"\x81\xa1a\xc4\x01x"])
def test_a_header_is_one_map_of_plain_values(packed):
    assert reason_of(raw_frame(packed)) in ("header", "schema")


def test_a_header_that_claims_long_lists_within_lists_gets_no_room():
    """Five bytes that claim 65,535 entries, a thousand levels deep, would take half a gigabyte."""
    import tracemalloc

    tracemalloc.start()
    assert reason_of(raw_frame(b"\xdc\xff\xff" * 1000)) == "header"
    assert tracemalloc.get_traced_memory()[1] < 2 ** 20
    tracemalloc.stop()


def header_of(message, **changes):
    data = frame_of(message)
    size = PREAMBLE.unpack_from(data)[3]
    return msgpack.unpackb(data[PREAMBLE.size:PREAMBLE.size + size]) | changes


def refused_header(message, change) -> str:
    header = header_of(message)
    change(header)
    with pytest.raises(Refused) as refusal:
        check_header(header, BOUNDS, asks=True)
    return refusal.value.reason


@pytest.mark.parametrize(("reason", "change"), [
    ("schema", lambda h: h.pop("step")),
    ("schema", lambda h: h.update(extra=1)),
    ("schema", lambda h: h.update(kind="shell")),
    ("schema", lambda h: h.update(step=-1)),
    ("schema", lambda h: h.update(step=True)),
    ("schema", lambda h: h.update(micro=2 ** 60)),
    ("schema", lambda h: h.update(party="../a")),
    ("schema", lambda h: h["fields"].pop("lengths")),
    ("schema", lambda h: h["fields"].update(weights=[float("nan")])),
    ("schema", lambda h: h["fields"].update(layout="sideways")),
    ("schema", lambda h: h["fields"].update(lengths=[3, 2.0])),
    ("schema", lambda h: h["fields"].update(lengths=[5, 0])),
    ("schema", lambda h: h["fields"].update(offsets=[0, -1])),
    ("schema", lambda h: h["tensors"].pop()),
    ("schema", lambda h: h["tensors"].append(["other", "fp32", "float32", [1]])),
    ("schema", lambda h: h["tensors"].append(h["tensors"][0])),
    ("schema", lambda h: h["tensors"][0].pop()),
    ("schema", lambda h: h["tensors"][0].__setitem__(3, [5, -16])),
    ("shape", lambda h: h["fields"].update(lengths=[3, 3])),
    ("shape", lambda h: h["fields"].update(lengths=[], offsets=[])),
    ("shape", lambda h: h["fields"].update(offsets=[0])),
    ("shape", lambda h: h["fields"].update(offsets=[0, 127])),
    ("shape", lambda h: h["fields"].update(lengths=[100, 100, 100], offsets=[0, 0, 0])),
    ("shape", lambda h: h["fields"].update(lengths=[1] * 9, offsets=[0] * 9)),
    ("shape", lambda h: h["tensors"][0].__setitem__(3, [5, 17])),
    ("shape", lambda h: h["tensors"][0].__setitem__(3, [5, 16, 1])),
    ("shape", lambda h: h["tensors"][0].__setitem__(3, [2 ** 39, 16])),
    ("shape", lambda h: h["tensors"][1].__setitem__(3, [4])),
    ("shape", lambda h: [t.__setitem__(3, [6]) for t in h["tensors"][1:]]),
    ("dtype", lambda h: h["tensors"][0].__setitem__(1, "pickle")),
    ("dtype", lambda h: h["tensors"][0].__setitem__(2, "object")),
    ("dtype", lambda h: h["tensors"][0].__setitem__(1, "u8")),
    ("dtype", lambda h: h["tensors"][1].__setitem__(1, "fp32")),
])
def test_a_header_that_does_not_keep_the_schema_is_refused(reason, change):
    assert refused_header(loss_request(), change) == reason


def test_a_codec_that_the_policy_does_not_allow_is_refused():
    strict = dataclasses.replace(BOUNDS, codecs=frozenset({"bf16"}))
    with pytest.raises(Refused) as refusal:
        check_header(header_of(loss_request()), strict, asks=True)
    assert refusal.value.reason == "dtype"


def test_a_gradient_has_the_backs_columns_and_as_many_places_as_its_outputs():
    for gradient, forward in ((torch.ones(2, WIDTH + 1), None), (torch.ones(3, WIDTH), outputs_request()),
                              (torch.ones(2, WIDTH), outputs_request(output="logits"))):
        with pytest.raises(Refused) as refusal:
            received(GradientRequest(Key(1, 0), gradient, forward), asks=True)
        assert refusal.value.reason == "shape"


def test_a_reply_must_fit_its_request():
    known = BOUNDS.expecting({"tokens": 4})
    with pytest.raises(Refused) as refusal:
        received(replies()[2], asks=False, bounds=known)
    assert refusal.value.reason == "shape"


@pytest.mark.parametrize("codec", codec_names())
def test_values_that_are_not_finite_are_refused_before_a_tensor_is_made(codec, monkeypatch):
    good = bytearray(frame_of(loss_request(), codec))
    header = PREAMBLE.unpack_from(good)[3]
    start = PREAMBLE.size + header
    good[start:start + 4] = {"fp32": struct.pack("<f", float("nan")), "bf16": b"\x80\x7f\x00\x00",
                             "int8": struct.pack("<f", float("inf"))}[codec]
    body = bytes(good[start:-4])
    data = bytes(good[:start]) + body + struct.pack("<I", zlib.crc32(body, zlib.crc32(bytes(good[:start]))))
    monkeypatch.setattr(type(codec_named(codec)), "decode", lambda *_: pytest.fail("a tensor was made"))
    assert reason_of(data) == "non-finite"


@pytest.mark.parametrize(("name", "values"), [("places", [0, 1, 5]), ("labels", [0, 1, 40])])
def test_places_and_labels_out_of_range_are_refused(name, values):
    assert reason_of(frame_of(dataclasses.replace(loss_request(), **{name: torch.tensor(values)}))) == "shape"


def test_an_update_has_a_bound_on_its_values():
    big = AnswerRequest(Phase(1, 1, "collect", 0), {"a": torch.zeros(6000), "b": torch.zeros(6000)}, 5)
    assert reason_of(frame_of(big)) == "shape"


def test_a_header_above_its_limit_is_not_sent():
    with pytest.raises(Refused) as refusal:
        encode_frame({"text": "x" * 70_000}, [])
    assert refusal.value.reason == "oversized"
