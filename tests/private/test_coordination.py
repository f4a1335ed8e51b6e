"""Joint rounds over the wire: the written-out mean, masks' phases, a coordinator that is replaced again and again."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest
import torch

from deltaloom.errors import ResourceError
from deltaloom.private.audit import Audit, read_audit
from deltaloom.private.coordination import Coordination
from deltaloom.private.guards.masks import Masks
from deltaloom.private.means.weighted import Weighted
from deltaloom.private.round_messages import AnswerRequest, LeaveRequest, Phase, StandRequest
from deltaloom.private.rounds import Coordinator, RoundSettings
from deltaloom.private.service import Service
from tests.private.owned import channel, cut_off, joined, owner_folder
from tests.private.toy_owner import ToyBack

pytestmark = pytest.mark.timeout(60)
NAMES = ("a", "b", "c")
COMMON = {"k": torch.zeros(2, 3), "layer/v": torch.ones(4)}


def values(party: str, round: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * round + ord(party))
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in COMMON.items()}


def count(party: str, round: int) -> int:
    return 3 * round + ord(party) - 96


def oracle(round: int) -> dict[str, torch.Tensor]:
    total = sum(count(party, round) for party in NAMES)
    sums = {name: sum(values(party, round)[name].double() * count(party, round) for party in NAMES) for name in COMMON}
    return {name: (one / total).float() for name, one in sums.items()}


def coordinator(masks: bool) -> Coordinator:
    chosen = RoundSettings(rounds=2, parties=3, quorum=3, deadline=100.0)
    return Coordinator(chosen, Weighted(), COMMON, run="r", guard=Masks() if masks else None)


def serve(folder, masks: bool, listen: str = "127.0.0.1:0") -> Service:
    running = Service(folder, ToyBack(), listen=listen,
                      coordinator=lambda audit: Coordination(coordinator(masks), folder / "rounds", audit))
    running.start()
    return running


def take_part(wire, party: str, masks: bool, commons: dict) -> None:
    """A party's rounds until the last is over; only the version at hand and the masks' half are kept between requests."""
    have, halves = -1, {}
    while True:
        stand = wire.submit(StandRequest(have)).result(30)
        if stand.common is not None:
            have = stand.phase.version
            commons[party, have] = stand.common
        if stand.done:
            return
        if not stand.wanted:
            time.sleep(0.02)
            continue
        update, rows = values(party, stand.phase.round), count(party, stand.phase.round)
        if masks:
            half = halves.setdefault(stand.label, Masks().half(party, stand.label, party.encode() * 32))
            answer = half.answer(stand.phase.phase, stand.told, update, rows)
            update, rows = dict(answer.tensors), answer.count
        assert wire.submit(AnswerRequest(stand.phase, update, rows)).result(30).status in ("accepted", "repeat")


@pytest.mark.parametrize("masks", [False, True], ids=["plain", "masks"])
@pytest.mark.parametrize("replaced", [False, True], ids=["one owner", "owners that are replaced"])
def test_the_common_values_are_the_written_out_mean(tmp_path, masks, replaced):
    folder = tmp_path / "o"
    owner_folder(folder)
    running = serve(folder, masks)
    members = {name: joined(running.authority, tmp_path, name, running.address) for name in NAMES}
    commons: dict = {}
    with ExitStack() as stack:
        wires = {name: stack.enter_context(channel(member, purpose="rounds")) for name, member in members.items()}
        threads = [threading.Thread(target=take_part, args=(wires[name], name, masks, commons)) for name in NAMES]
        for thread in threads:
            thread.start()
        while replaced and any(thread.is_alive() for thread in threads):
            time.sleep(0.1)
            cut_off(running)
            running = serve(folder, masks, running.address)
        for thread in threads:
            thread.join(30)
    running.stop(grace=1)
    for name in NAMES:
        for version in (1, 2):
            if (name, version) in commons:
                for key, expected in oracle(version).items():
                    torch.testing.assert_close(commons[name, version][key], expected, rtol=0, atol=2e-6 if masks else 0)
        assert (name, 2) in commons
    records = read_audit(folder / "audit.jsonl")
    assert [record["round"] for record in records if record["what"] == "round-published"] == [1, 2]
    counts = [record["count"] for record in records if record["what"] == "round-accepted" and record["phase"] == "collect"]
    assert sorted(counts) == (sorted([0] * 6) if masks else sorted(count(name, round) for name in NAMES for round in (1, 2)))


def test_nothing_is_told_before_it_is_saved(tmp_path, monkeypatch):
    audit = Audit(tmp_path / "audit.jsonl")
    rounds = Coordination(coordinator(False), tmp_path / "rounds", audit)
    for name in NAMES:
        rounds.answer(name, StandRequest())
    save = Coordinator.save
    monkeypatch.setattr(Coordinator, "save", lambda *_: (_ for _ in ()).throw(ResourceError("no space")))
    request = AnswerRequest(Phase(1, 1, "collect", 0), values("a", 1), 4)
    for _ in range(2):
        with pytest.raises(ResourceError):
            rounds.answer("a", request)
        with pytest.raises(ResourceError):
            rounds.answer("a", StandRequest(join=False))
    monkeypatch.setattr(Coordinator, "save", save)
    assert rounds.answer("a", request).status == "repeat"
    again = Coordination(coordinator(False), tmp_path / "rounds", audit)
    assert not again.answer("a", StandRequest()).wanted and again.answer("b", StandRequest()).wanted


def test_a_party_that_leaves_is_not_waited_for(tmp_path):
    short = Coordinator(RoundSettings(rounds=1, parties=2, quorum=1), Weighted(), COMMON, run="r")
    rounds = Coordination(short, tmp_path / "rounds", Audit(tmp_path / "audit.jsonl"))
    for name in ("a", "b"):
        rounds.answer(name, StandRequest())
    rounds.answer("a", AnswerRequest(Phase(1, 1, "collect", 0), values("a", 1), 4))
    rounds.answer("b", LeaveRequest())
    stand = rounds.answer("a", StandRequest(have=0))
    assert stand.done and torch.equal(stand.common["k"], values("a", 1)["k"])
