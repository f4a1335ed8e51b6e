"""Ten thousand malformed frames against the parser; some against a live server, in the tier `slow` ten thousand there too."""

from __future__ import annotations

import threading
import tracemalloc
from collections import Counter
from pathlib import Path

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.private.refused import REASONS, Refused
from deltaloom.private.transport import STREAM, secure_channel
from deltaloom.private.wire.convert import Refusal, decode_message
from deltaloom.private.wire.frame import CHUNK, unpack_header
from deltaloom.private.wire.schema import check_header
from tests.private.malformed import Mutator, packed_frame
from tests.private.owned import OwnerProcess, channel, hello, joined, owner_folder, step_request
from tests.private.toy_owner import ToyBack
from tests.private.wired import BOUNDS, assemble, assert_same, frame_of

LEAVES = (st.none() | st.booleans() | st.integers(-2 ** 63, 2 ** 64 - 1) | st.floats() | st.text(max_size=20)
          | st.binary(max_size=20))
PLAIN = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
                     max_leaves=12)


def fate(data: bytes, *, asks: bool, size: int | None = None) -> str:
    """What became of some bytes: the reason, or "legal"."""
    try:
        frame = assemble(data, asks=asks, size=size)
        assert frame is not None
        decode_message(frame.header, frame.body, BOUNDS)
    except Refused as refusal:
        assert refusal.reason in REASONS and len(str(refusal)) < 4000
        return refusal.reason
    return "legal"


def test_ten_thousand_malformed_frames_are_refused_with_a_reason_and_little_memory():
    mutator, fates = Mutator(1), Counter()
    tracemalloc.start()
    for number in range(10_000):
        data = mutator.frame()
        fates[fate(data, asks=number % 5 > 0, size=None if number % 3 else 4096)] += 1
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 8 * 2 ** 20
    seen = {"magic", "version", "truncated", "oversized", "checksum", "header", "schema", "shape", "dtype", "non-finite"}
    assert seen <= set(fates)
    assert fates["legal"] < 3000   # a changed step or value may well be legal


@given(PLAIN)
@settings(max_examples=300, deadline=None)
def test_any_header_is_a_checked_record_or_a_refusal(header):
    assert fate(packed_frame(header, b""), asks=True) in REASONS


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_header_or_a_refusal(raw):
    try:
        header = unpack_header(memoryview(raw))
    except Refused as refusal:
        assert refusal.reason == "header"
        return
    with pytest.raises(Refused):
        check_header(header, BOUNDS, asks=True)


@given(st.integers(0, 2 ** 32), st.integers(1, 5000))
@settings(max_examples=100, deadline=None)
def test_however_it_is_cut_into_chunks_a_frame_is_the_same_or_refused(seed, size):
    data = Mutator(seed).frame()
    whole, found = fate(data, asks=True), fate(data, asks=True, size=size)
    if found not in {whole, "truncated"}:  # a frame may end with a chunk: its checksum is then looked at before what follows,
        assert whole == "oversized"        # and what follows is another frame, not too much
        assert found == "checksum" or any(is_framed(data[:end]) for end in range(size, len(data), size))


def is_framed(data: bytes) -> bool:
    """Whether these bytes are one frame from end to end, whatever it says."""
    try:
        return assemble(data, asks=True) is not None
    except Refused:
        return False


@pytest.mark.parametrize(("seed", "size"), [(994394154, 254), (3859974462, 507), (867641268, 179)])
def test_a_frame_that_ends_with_a_chunk_is_followed_by_another(seed, size):
    data = Mutator(seed).frame()
    assert fate(data, asks=True) == "oversized" and is_framed(data[:size])
    rest = data[size:]
    assert fate(data, asks=True, size=size) in {fate(rest, asks=True, size=size), "truncated"}


def resident(process: OwnerProcess) -> int:
    """The process's resident memory in bytes."""
    return int(Path(f"/proc/{process.process.pid}/statm").read_text().split()[1]) * 4096


def hostile_stream(wire, frames: list[bytes], party: str) -> str:
    """What a stream that sends a hello and then these bytes hears at its end."""
    sent = [frame_of(hello(run="hostile"), party=party), *frames]
    heard = "ended"
    pieces = [frame[i:i + CHUNK] for frame in sent for i in range(0, len(frame), CHUNK)]
    call = wire.stream_stream(STREAM)(iter(pieces), timeout=20)
    try:
        for chunk in call:
            message = decode_message((frame := assemble(chunk, asks=False)).header, frame.body, BOUNDS)
            heard = message.reason if isinstance(message, Refusal) else heard
    except grpc.RpcError as error:
        heard = error.code().name
    return heard


def assert_others_are_served_under_attack(folder, count: int) -> None:
    owner_folder(folder / "o")
    with OwnerProcess(folder / "o") as owner:
        from deltaloom.private.authority import Authority

        authority = Authority(folder / "o")
        good, bad = (joined(authority, folder, name, owner.address) for name in ("good", "a"))   # the frames speak for "a"
        done, mutator, fates = threading.Event(), Mutator(2), Counter()
        served: list = []

        def steps() -> None:
            with channel(good) as wire:
                local = ToyBack()
                while not done.is_set() or len(served) < 5:
                    request = step_request(len(served) + 1)
                    assert_same(wire.submit(request).result(20), local.answer("good", request))
                    served.append(request.key.step)

        with_steps = threading.Thread(target=steps)
        with_steps.start()
        wire = secure_channel(owner.address, bad.authority, bad.credential())
        before = None
        for number in range(count):
            fates[hostile_stream(wire, [mutator.frame()], "a")] += 1
            if number == min(count // 4, 500):
                before = resident(owner)
        after = resident(owner)
        wire.close()
        done.set()
        with_steps.join(timeout=60)
        assert served and not with_steps.is_alive()
        assert after - before < 48 * 2 ** 20, (before, after)
        assert set(fates) <= set(REASONS) | {"ended"}, fates
        assert {"magic", "schema", "checksum"} <= set(fates)
        assert owner.stop() == 0


@pytest.mark.timeout(120)
def test_malformed_frames_leave_a_live_server_serving_others(tmp_path):
    assert_others_are_served_under_attack(tmp_path, 300)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_malformed_frames_leave_a_live_server_serving_others(tmp_path):
    assert_others_are_served_under_attack(tmp_path, 10_000)
