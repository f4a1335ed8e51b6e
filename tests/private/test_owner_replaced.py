"""The one training loop over gRPC: an owner that is replaced meanwhile changes no bit, a lossy codec little."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest
import torch

from deltaloom.private.back import Back
from deltaloom.private.client import GrpcChannel
from deltaloom.private.cut import split
from deltaloom.private.policy import Policy
from tests.private.owned import QUICK, cut_off, hello, joined, service
from tests.private.pieces import PREFIX, run_front, run_split, settings_for, task_name, three_blocks

pytestmark = pytest.mark.timeout(120)
CASES = [("llama", "owner", "owner"), ("llama", "home", "party"), ("bert", "home", "party")]


def halves(layout: str, head: str):
    return split(three_blocks(layout), task_name(layout), 1, head=head)


def greeting(back: Back, labels: str, codec: str = "fp32"):
    return hello(cut=1, labels=labels, codec=codec, fingerprint=back.facts.fingerprint)


def assert_same_state(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("layout", "labels", "head"), CASES)
def test_an_owner_that_is_replaced_in_the_middle_changes_no_bit(tmp_path, layout, labels, head):
    """Again and again the owner's service ends at once and another one takes its address, whose back remembers nothing."""
    settings = settings_for(max_steps=8)
    local = run_split(layout, three_blocks(layout), [PREFIX], settings, labels=labels, head=head)
    front, owner_half = halves(layout, head)
    with ExitStack() as stack:
        back = Back(owner_half)
        running = stack.enter_context(service(tmp_path / "o", back, Policy(cut=1)))
        wire = GrpcChannel(joined(running.authority, tmp_path, "a", running.address), greeting(back, labels), QUICK)
        address, done, replaced = running.address, threading.Event(), []

        def replace() -> None:
            current = running
            while not done.wait(0.05):
                cut_off(current)   # what is under way is lost
                current = stack.enter_context(service(tmp_path / "o", Back(owner_half), Policy(cut=1), listen=address))
                replaced.append(current)

        replacing = threading.Thread(target=replace)
        replacing.start()
        remote = run_front(layout, front, wire, [PREFIX], settings, labels=labels)
        done.set()
        replacing.join()
        assert len(replaced) >= 2 and wire.traffic.connections >= 2
        wire.close()
    assert remote.losses == local.losses
    assert_same_state(remote.state, local.state)


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_a_lossy_codec_trains_nearly_the_same(tmp_path, codec):
    settings = settings_for()
    local = run_split("llama", three_blocks("llama"), [PREFIX], settings, labels="owner", head="owner")
    front, owner_half = halves("llama", "owner")
    back = Back(owner_half)
    with service(tmp_path / "o", back, Policy(cut=1)) as owner:
        wire = GrpcChannel(joined(owner.authority, tmp_path, "a", owner.address), greeting(back, "owner", codec), QUICK)
        remote = run_front("llama", front, wire, [PREFIX], settings, labels="owner")
        wire.close()
    assert remote.losses != local.losses
    assert remote.losses == pytest.approx(local.losses, rel=0.02)
