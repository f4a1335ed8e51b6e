"""Joint rounds over the wire: the written-out mean, masks' phases, a coordinator that is replaced again and again."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest
import torch

from deltaloom.private.audit import read_audit
from deltaloom.private.coordinating import DurableRounds
from deltaloom.private.guards.masks import Masks
from deltaloom.private.joining import Participant
from deltaloom.private.journal import note_rounds
from deltaloom.private.means.weighted import Weighted
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
                      coordinator=lambda audit: DurableRounds(coordinator(masks), folder / "rounds", tell=note_rounds(audit)))
    running.start()
    return running


def take_part(wire, party: str, masks: bool, folder, commons: dict) -> None:
    """A party's rounds until the last is over."""
    folder.mkdir()
    guard = Masks() if masks else None
    someone = Participant(party, folder, lambda request: wire.submit(request).result(30),
                          lambda round, common: (values(party, round), count(party, round)), wait=lambda stand: time.sleep(0.02),
                          guard=guard, secret=party.encode() * 32)
    commons[party] = someone.run()


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
        threads = [threading.Thread(target=take_part, args=(wires[name], name, masks, tmp_path / f"{name}-rounds", commons))
                   for name in NAMES]
        for thread in threads:
            thread.start()
        while replaced and any(thread.is_alive() for thread in threads):
            time.sleep(0.1)
            cut_off(running)
            running = serve(folder, masks, running.address)
        for thread in threads:
            thread.join(30)
    running.stop(grace=1)
    assert set(commons) == set(NAMES)
    for name in NAMES:
        for key, expected in oracle(2).items():
            torch.testing.assert_close(commons[name][key], expected, rtol=0, atol=2e-6 if masks else 0)
    records = read_audit(folder / "audit.jsonl")
    assert [record["round"] for record in records if record["what"] == "round-published"] == [1, 2]
    accepted = [(record["round"], record["phase"], record["parties"]) for record in records if record["what"] == "round-accepted"]
    assert len(set(accepted)) == 2 * 3 * (4 if masks else 1)
