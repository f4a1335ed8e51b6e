"""Faults with real processes and real connections: the answers stay the back's, and nothing is lost."""

from __future__ import annotations

import random
import time

import pytest

from deltaloom.errors import ResourceError
from deltaloom.private.audit import Audit, read_audit, verify
from deltaloom.private.authority import Authority
from deltaloom.private.client import GrpcChannel, OwnerAway, Reconnect
from deltaloom.private.refused import Refused
from tests.private.owned import QUICK, OwnerProcess, channel, hello, joined, owner_folder, service, step_request
from tests.private.proxy import Fault, Proxy, random_cuts
from tests.private.toy_owner import ToyBack
from tests.private.wired import assert_same

pytestmark = pytest.mark.timeout(60)


def assert_steps(wire: GrpcChannel, first: int, last: int, window: int = 4) -> None:
    """Steps of several micro-batches each, as training sends them; every answer is the back's, bit for bit."""
    local = ToyBack()
    for step in range(first, last + 1):
        requests = [step_request(step, micro) for micro in range(window)]
        futures = [wire.submit(request) for request in requests]
        for request, future in zip(requests, futures, strict=True):
            assert_same(future.result(60), local.answer("a", request))


def assert_nothing_is_lost_by_kills(tmp_path, kills: int, seed: int) -> None:
    """Kill -9 of the owner's process at random moments of a stream of steps, each time followed by a restart."""
    owner_folder(tmp_path / "o")
    chance = random.Random(seed)
    with OwnerProcess(tmp_path / "o", seconds=0.01) as owner:
        member = joined(Authority(tmp_path / "o"), tmp_path, "a", owner.address)
        with channel(member) as wire:
            assert_steps(wire, 1, 1)
            step = 2
            for _ in range(kills):
                futures = [wire.submit(step_request(step, micro)) for micro in range(4)]
                time.sleep(chance.random() * 0.08)
                owner.kill()
                owner.start()
                local = ToyBack()
                for micro, future in enumerate(futures):
                    assert_same(future.result(60), local.answer("a", step_request(step, micro)))
                assert_steps(wire, step + 1, step + 1)
                step += 2
            assert wire.traffic.connections > kills
        assert owner.stop() == 0
    records = read_audit(tmp_path / "o" / "audit.jsonl")
    assert sum(record["what"] == "started" for record in records) == kills + 1
    assert {record["outcome"] for record in records if record["what"] == "loss"} <= {"answered", "repeat"}


def test_kill_9_of_the_owner_loses_nothing(tmp_path):
    assert_nothing_is_lost_by_kills(tmp_path, 1, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_of_the_owner_at_twenty_random_points_loses_nothing(tmp_path):
    assert_nothing_is_lost_by_kills(tmp_path, 20, seed=1)


def assert_steps_pass(tmp_path, fault, steps: int = 12, *, more_connections: bool = True, reconnect: Reconnect = QUICK) -> None:
    """Steps through a proxy with a fault, while another party goes straight."""
    with service(tmp_path / "o") as owner, Proxy(lambda: owner.address, fault) as proxy:
        member, other = (joined(owner.authority, tmp_path, name, owner.address) for name in ("a", "b"))
        with channel(member, reconnect=reconnect, address=proxy.address) as wire, channel(other) as straight:
            assert_steps(wire, 1, steps)
            assert_steps(straight, 1, 2)
            assert straight.traffic.connections == 1
            assert (wire.traffic.connections > 1) == more_connections
        assert verify(tmp_path / "o" / "audit.jsonl").lines > 4 * steps


def test_connections_that_are_cut_at_random_bytes(tmp_path):
    assert_steps_pass(tmp_path, random_cuts(3, 40_000))


def test_a_slow_connection(tmp_path):
    assert_steps_pass(tmp_path, lambda number: Fault(delay=0.01), 3, more_connections=False)


def test_a_connection_that_falls_silent_is_noticed(tmp_path):
    assert_steps_pass(tmp_path, lambda number: Fault(hold=20_000 if number == 0 else None), 8)


def test_a_connection_that_changes_bytes(tmp_path):
    assert_steps_pass(tmp_path, lambda number: Fault(spoil=15_000 if number < 2 else None), 8)


def test_a_connection_that_reorders_bytes(tmp_path):
    assert_steps_pass(tmp_path, lambda number: Fault(swap=15_000 if number < 2 else None), 8)


def test_a_connection_that_is_played_twice_to_the_owner(tmp_path):
    assert_steps_pass(tmp_path, lambda number: Fault(twin=True), 3, more_connections=False)


def test_sigterm_answers_what_is_under_way_and_the_client_goes_on_with_the_next_process(tmp_path):
    owner_folder(tmp_path / "o")
    with OwnerProcess(tmp_path / "o", seconds=0.3) as owner:
        member = joined(Authority(tmp_path / "o"), tmp_path, "a", owner.address)
        with channel(member) as wire:
            _ = wire.welcome
            futures = [wire.submit(step_request(1, micro)) for micro in range(4)]
            time.sleep(0.1)
            assert owner.stop() == 0
            assert all(future.done() for future in futures)
            later = wire.submit(step_request(2))
            owner.start()
            assert_same(later.result(30), ToyBack().answer("a", step_request(2)))
    what = [record["what"] for record in read_audit(tmp_path / "o" / "audit.jsonl")]
    assert what == ["started", "enrolled", "connected", *["loss"] * 4, "stopped", "started", "connected", "loss"]


def test_a_full_disk_at_the_owner_stops_nobody_for_good(tmp_path, monkeypatch):
    with service(tmp_path / "o") as owner, channel(joined(owner.authority, tmp_path, "a", owner.address)) as wire:
        assert_steps(wire, 1, 1)
        full, write = [True], Audit.write

        def writing(self, who, what, **facts):
            if full[0]:
                raise ResourceError("no space is left to write audit.jsonl")
            return write(self, who, what, **facts)

        monkeypatch.setattr(Audit, "write", writing)
        future = wire.submit(step_request(2))
        time.sleep(0.5)
        assert not future.done()
        full[0] = False
        assert_same(future.result(20), ToyBack().answer("a", step_request(2)))
        assert_steps(wire, 3, 3)


def test_a_party_that_dies_and_comes_back_takes_its_own_place(tmp_path):
    """Its old connection is held open by the network, so that the owner cannot see that the party is gone."""
    with service(tmp_path / "o") as owner, Proxy(lambda: owner.address, lambda n: Fault(hold=6000 if n == 0 else None)) as proxy:
        member = joined(owner.authority, tmp_path, "a", owner.address)
        lost = GrpcChannel(member, hello(), Reconnect(patience=1, keepalive=60), address=proxy.address)
        _ = lost.welcome
        with channel(member, address=proxy.address) as wire:
            assert_steps(wire, 1, 3)
            assert len(owner.status()["streams"]) == 1
        lost.close()


def test_an_owner_that_stays_away_is_an_error_that_says_so(tmp_path):
    with service(tmp_path / "o") as owner:
        member = joined(owner.authority, tmp_path, "a", owner.address)
    with channel(member, reconnect=Reconnect(patience=0.5, first_wait=0.05, longest_wait=0.2)) as wire:
        with pytest.raises(OwnerAway, match="could not be reached"):
            _ = wire.welcome
        with pytest.raises(OwnerAway):
            wire.submit(step_request(1))


def test_an_owner_that_comes_back_with_another_model_is_refused(tmp_path):
    import dataclasses

    from tests.private.wired import FACTS

    with service(tmp_path / "o") as owner:
        member = joined(owner.authority, tmp_path, "a", owner.address)
        address = owner.address
        wire = GrpcChannel(member, hello(fingerprint=""), QUICK)
        assert_steps(wire, 1, 1)
    with service(tmp_path / "o", ToyBack(dataclasses.replace(FACTS, fingerprint="0" * 64)), listen=address), \
            pytest.raises(Refused, match="another model"):
        wire.submit(step_request(2)).result(20)
    wire.close()
