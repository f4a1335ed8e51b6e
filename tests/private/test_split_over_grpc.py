"""The laws of the split over real gRPC with mutual TLS on loopback: the real back, the real wire, the one loop."""

import threading

import pytest
import torch

from deltaloom.generate import generate
from deltaloom.private.back import Back, BackSettings
from deltaloom.private.cut import split
from deltaloom.private.decode import Writer
from deltaloom.private.messages import BusyError, OpenRequest
from deltaloom.private.policy import Policy
from deltaloom.private.sessions import SessionSettings
from deltaloom.tuned import attach
from tests.private.owned import channel, joined, service
from tests.private.pieces import is_causal, run_front, run_whole, settings_for, task_name, three_blocks
from tests.private.test_decode import PROMPTS
from tests.private.test_remote import assert_same, prefix
from tests.toy_tokenizers import byte_level

pytestmark = pytest.mark.timeout(120)
POLICY = Policy(cut=1)


def greeting(front, labels, **more):
    return {"cut": 1, "fingerprint": front.fingerprint, "labels": labels, "method": "prefix", **more}


@pytest.mark.parametrize("layout, labels, head", [("llama", "owner", "owner"), ("gpt2", "owner", "owner"),
                                                  ("llama", "home", "party"), ("bert", "home", "party")])
def test_training_and_predicting_are_the_unsplit_models_bit_for_bit(tmp_path, layout, labels, head):
    settings = settings_for(packing=is_causal(layout) and labels == "owner")
    whole = run_whole(layout, three_blocks(layout), prefix(layout), settings, heads=not is_causal(layout))
    front, back = split(three_blocks(layout), task_name(layout), 1, head=head)
    with service(tmp_path / "o", Back(back), POLICY) as owner:
        member = joined(owner.authority, tmp_path, "a", owner.address)
        with channel(member, **greeting(front, labels)) as wire:
            assert wire.window > 1
            there = run_front(layout, front, wire, prefix(layout), settings, labels=labels)
            assert_same(whole, there, layout)


def test_split_inference_writes_the_whole_models_tokens(tmp_path):
    whole = attach(three_blocks("llama"), prefix("llama"))
    expected = generate(whole, byte_level(), PROMPTS, max_new_tokens=8, batch_size=1)
    front, back = split(three_blocks("llama"), "causal-lm", 1)
    serving = Back(back)
    with service(tmp_path / "o", serving, POLICY) as owner:
        member = joined(owner.authority, tmp_path, "a", owner.address)
        with channel(member, **greeting(front, "owner", purpose="inference")) as wire:
            writer = Writer(attach(front.model, prefix("llama")), front, wire, byte_level())
            assert writer.generate(PROMPTS, max_new_tokens=8, at_once=2) == expected
            found = []
            for index, piece in enumerate(writer.stream(PROMPTS[0], max_new_tokens=8)):
                found.append(piece)
                if index == 2:
                    serving.forget("a")
            assert "".join(found) == expected[0]


def test_a_killed_writers_sessions_make_room_for_the_next_process_and_no_one_elses_do(tmp_path):
    front, back = split(three_blocks("llama"), "causal-lm", 1)
    serving = Back(back, BackSettings(sessions=SessionSettings(per_party=2)))
    with service(tmp_path / "o", serving, POLICY) as owner:
        a, b = (joined(owner.authority, tmp_path, name, owner.address) for name in "ab")
        kind = greeting(front, "owner", purpose="inference")
        with channel(b, run="other", **kind) as other, channel(a, run="beside", **kind) as beside:
            for wire in (other, beside):
                wire.submit(OpenRequest("kept", 5)).result(30)
            with channel(a, run="killed", **kind) as killed:
                killed.submit(OpenRequest("lost", 5)).result(30)
                with pytest.raises(BusyError):
                    killed.submit(OpenRequest("more", 5)).result(30)
            with channel(a, run="again", **kind) as wire:
                writer = Writer(attach(front.model, prefix("llama")), front, wire, byte_level())
                assert len(writer.generate(PROMPTS, max_new_tokens=3)) == len(PROMPTS)
            assert set(serving.sessions._open) == {("a", "kept"), ("b", "kept")}


def test_two_parties_at_once_get_what_each_gets_alone(tmp_path):
    settings = settings_for()
    whole = run_whole("llama", three_blocks("llama"), prefix("llama"), settings, heads=False)
    back = split(three_blocks("llama"), "causal-lm", 1)[1]
    fronts = {name: split(three_blocks("llama"), "causal-lm", 1)[0] for name in ("a", "b")}
    found = {}

    def work(name, member):
        with channel(member, **greeting(fronts[name], "owner")) as wire:
            found[name] = run_front("llama", fronts[name], wire, prefix("llama"), settings, labels="owner").state

    with service(tmp_path / "o", Back(back), POLICY) as owner:
        members = {name: joined(owner.authority, tmp_path, name, owner.address) for name in fronts}
        threads = [threading.Thread(target=work, args=(name, member)) for name, member in members.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for state in (found["a"], found["b"]):
        for key, tensor in whole.state.items():
            torch.testing.assert_close(state[key], tensor, rtol=1e-4, atol=1e-4)
