"""Rounds: the mean by this round's samples, quorum and deadline, repeats, clocks, checkpoints, masks with lost parties."""

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.errors import CheckpointError, DataError, RefusedError, SettingsError
from deltaloom.private.guards.base import Answer
from deltaloom.private.guards.masks import Masks
from deltaloom.private.means.median import Median
from deltaloom.private.means.weighted import Weighted
from deltaloom.private.round_messages import Phase
from deltaloom.private.rounds import Coordinator, RoundSettings
from tests.private.rounds_oracle import NAMES, common, count, oracle, values


def machine(masks: bool = False, **changes: object) -> Coordinator:
    chosen = {"rounds": 2, "parties": 3, "quorum": 2, "deadline": 100.0} | changes
    return Coordinator(RoundSettings(**chosen), Weighted(), common(), run="r", guard=Masks() if masks else None)


def started(**changes: object) -> Coordinator:
    coordinator = machine(**changes)
    for name in NAMES:
        coordinator.join(name, 0.0)
    return coordinator


def send(coordinator: Coordinator, party: str, now: float = 1.0, round_: int | None = None):
    round_ = round_ or coordinator.round
    answer = Answer(values(party, round_), count(party, round_))
    return coordinator.submit(party, Phase(round_, 1, "collect", round_ - 1), answer, now)


def assert_common(coordinator: Coordinator, expected: dict[str, torch.Tensor]) -> None:
    assert {name: tensor.tolist() for name, tensor in coordinator.common.items()} == {n: t.tolist() for n, t in expected.items()}


def whats(happened) -> list[str]:
    return [each.what for each in happened]


def test_a_round_opens_with_its_parties_and_publishes_the_written_out_mean():
    coordinator = machine()
    assert coordinator.join("ada", 0) == coordinator.join("bob", 0) == () and coordinator.seconds_left() is None
    assert whats(coordinator.join("cyd", 0)) == ["opened"]
    assert whats(send(coordinator, "bob").happened) == ["accepted"]
    send(coordinator, "cyd")
    assert coordinator.told("ada").wanted and not coordinator.told("bob").wanted
    assert whats(send(coordinator, "ada").happened) == ["accepted", "closed", "published", "opened"]
    assert (coordinator.version, coordinator.round) == (1, 2)
    assert_common(coordinator, oracle(NAMES, 1))
    for name in NAMES:  # the weights are the samples of this round, not of the first
        receipt = send(coordinator, name)
    assert whats(receipt.happened)[-2:] == ["published", "done"] and coordinator.done
    assert_common(coordinator, oracle(NAMES, 2))


def test_the_order_of_arrival_changes_no_bit():
    ends = []
    for order in (NAMES, NAMES[::-1], ("bob", "ada", "cyd")):
        coordinator = started()
        for name in order:
            send(coordinator, name)
        ends.append(coordinator.common["k"])
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


def test_a_lost_party_is_not_waited_for_beyond_the_deadline():
    coordinator = started()
    send(coordinator, "ada", 10)
    send(coordinator, "bob", 20)
    assert coordinator.tick(99.9) == () and coordinator.seconds_left() == pytest.approx(0.1)
    assert whats(coordinator.tick(100)) == ["closed", "published", "opened"]
    assert_common(coordinator, oracle(("ada", "bob"), 1))
    late = send(coordinator, "cyd", 101, round_=1)
    assert (late.status, whats(late.happened)) == ("late", ["late"])
    assert_common(coordinator, oracle(("ada", "bob"), 1))
    assert send(coordinator, "cyd", 102).status == "accepted"  # and it is welcome in the next round


def test_without_quorum_a_round_waits_and_says_so_once_a_deadline():
    coordinator = started()
    send(coordinator, "ada", 10)
    happened = coordinator.tick(150)
    assert whats(happened) == ["waiting"] and happened[0].parties == ("bob", "cyd")
    assert coordinator.tick(199) == () and whats(coordinator.tick(250)) == ["waiting"]
    assert whats(send(coordinator, "cyd", 260).happened) == ["accepted", "closed", "published", "opened"]
    assert_common(coordinator, oracle(("ada", "cyd"), 1))


def test_a_party_that_leaves_is_not_waited_for_and_what_it_sent_counts():
    coordinator = started()
    send(coordinator, "ada")
    send(coordinator, "bob")
    assert whats(coordinator.leave("cyd", 2)) == ["closed", "published", "opened"]
    send(coordinator, "ada")
    coordinator.leave("ada", 3)
    with pytest.raises(RefusedError, match="no part"):
        send(coordinator, "cyd")
    assert "published" in whats(send(coordinator, "bob").happened)
    assert_common(coordinator, oracle(("ada", "bob"), 2))


def test_repeats_change_nothing_and_are_known_for_ever():
    coordinator = started()
    first = send(coordinator, "ada")
    again = send(coordinator, "ada")
    assert (first.status, again.status) == ("accepted", "repeat")
    with pytest.raises(RefusedError, match="other values"):
        coordinator.submit("ada", Phase(1, 1, "collect", 0), Answer(values("ada", 1), 99), 1)
    send(coordinator, "bob")
    send(coordinator, "cyd")
    assert send(coordinator, "ada", round_=1).status == "repeat"  # its reply was lost, and the round is over
    assert_common(coordinator, oracle(NAMES, 1))


def test_answers_that_belong_nowhere_are_refused():
    coordinator = started()
    good = Answer(values("ada", 1), 5)
    for ticket in (Phase(2, 1, "collect", 1), Phase(1, 2, "collect", 0), Phase(1, 1, "other", 0), Phase(1, 1, "collect", 5),
                   Phase(-1, 1, "collect", 0)):
        with pytest.raises(RefusedError):
            coordinator.submit("ada", ticket, good, 1)
    with pytest.raises(RefusedError, match="no part"):
        coordinator.submit("eve", Phase(1, 1, "collect", 0), good, 1)
    tensors = values("ada", 1)
    bad = [({}, 5), (tensors | {"x": tensors["k"]}, 5), ({"k": tensors["k"]}, 5), (tensors | {"k": tensors["k"].T}, 5),
           (tensors | {"k": tensors["k"].int()}, 5), (tensors | {"k": tensors["k"] * float("nan")}, 5),
           (tensors | {"v": tensors["v"] / 0}, 5), (tensors, 0), (tensors, -3), (tensors, 2**50)]
    for each, samples in bad:
        with pytest.raises(DataError):
            coordinator.submit("ada", Phase(1, 1, "collect", 0), Answer(each, samples), 1)
    assert send(coordinator, "ada").status == "accepted"  # none of them left a trace


def test_the_bound_on_changes_holds_and_is_told():
    coordinator = started(norm_bound=0.5)
    for name in NAMES:
        receipt = send(coordinator, name)
    assert whats(receipt.happened).count("shortened") == 3
    change = torch.cat([(coordinator.common[name].double() - common()[name].double()).flatten() for name in common()])
    assert float(change.norm()) <= 0.5 + 1e-2  # bfloat16 rounds


def test_only_the_coordinators_clock_counts_and_it_may_jump():
    coordinator = started()
    send(coordinator, "ada", 10)
    send(coordinator, "bob", 5)      # set back by five: no time passes
    assert coordinator.seconds_left() == 90
    coordinator.tick(-1000)
    assert coordinator.seconds_left() == 90
    coordinator.tick(-950)
    assert coordinator.seconds_left() == 40
    with pytest.raises(DataError):
        coordinator.tick(float("nan"))


def test_settings_that_cannot_go_together_are_refused():
    for changes in ({"quorum": 4}, {"rounds": 0}, {"deadline": 0}, {"norm_bound": -1}, {"masks": True, "quorum": 1},
                    {"masks": True, "norm_bound": 1.0}):
        with pytest.raises(SettingsError):
            machine(**changes)
    two = RoundSettings(rounds=1, parties=2, quorum=1)
    with pytest.raises(SettingsError, match="median"):
        Coordinator(two, Median(), common(), run="r")
    with pytest.raises(SettingsError, match="trim"):
        Coordinator(RoundSettings(rounds=1, parties=3, quorum=3), Median(), common(), run="r", guard=Masks())


# Killed at any point.

def restored(path, **changes: object) -> Coordinator:
    again = machine(**changes)
    again.restore(path)
    return again


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    coordinator = started()
    send(coordinator, "bob", 30.5)
    coordinator.save(tmp_path / "a")
    again = restored(tmp_path / "a")
    again.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert again.seconds_left() == 69.5 and again.tick(1e9) == () and again.seconds_left() == 69.5  # another clock


def test_a_checkpoint_of_something_else_is_refused_and_nothing_changes(tmp_path):
    coordinator = started()
    coordinator.save(tmp_path / "a")
    with pytest.raises(CheckpointError, match="other settings"):
        restored(tmp_path / "a", quorum=3)
    data = (tmp_path / "a").read_bytes()
    no_state = safetensors.torch.save({}, metadata={"rounds": json.dumps({})})
    for bad in (b"", data[:50], data[:-3], b"x" * 200, safetensors.torch.save({}), no_state):
        (tmp_path / "bad").write_bytes(bad)
        fresh = machine()
        with pytest.raises(CheckpointError):
            fresh.restore(tmp_path / "bad")
        assert fresh.round == 0
    with pytest.raises(CheckpointError):
        restored(tmp_path / "missing")


def drive(path, killed_at: frozenset[int], masks: bool) -> dict[str, torch.Tensor]:
    """Parties and a coordinator that dies before or after writing, at the given steps; whoever got no reply repeats itself."""
    secrets_of = {name: name.encode().ljust(32, b".") for name in NAMES}
    coordinator, step = machine(masks), 0

    def call(what) -> None:
        nonlocal coordinator, step
        while True:
            step += 2
            if step not in killed_at:
                what(coordinator)
                coordinator.save(path)
                if step + 1 not in killed_at:
                    return
            coordinator = machine(masks)
            if path.exists():
                coordinator.restore(path)

    def play(name: str) -> None:
        told = coordinator.told(name)
        if not told.wanted:
            return
        round_ = told.ticket.round
        answer = Answer(values(name, round_), count(name, round_))
        if masks:
            half = Masks().half(name, told.label, secrets_of[name])
            answer = half.answer(told.ticket.phase, told.told, values(name, round_), count(name, round_))
        call(lambda machine: machine.submit(name, told.ticket, answer, 1.0))

    for name in NAMES:
        call(lambda machine, name=name: machine.join(name, 0.0))
    while not coordinator.done:
        for name in NAMES:
            play(name)
    return coordinator.common


@pytest.mark.parametrize("masks", (False, True))
def test_killed_at_any_single_point_the_outcome_is_the_same(tmp_path, masks):
    expected = drive(tmp_path / "whole", frozenset(), masks)
    steps = 2 * (3 + 2 * 3 * (4 if masks else 1)) + 2
    for step in range(2, steps, 5 if masks else 1):
        end = drive(tmp_path / f"{step}", frozenset({step}), masks)
        assert all(torch.equal(end[name], expected[name]) for name in expected)


@given(st.frozensets(st.integers(2, 60), max_size=20))
@settings(max_examples=15, deadline=None)
def test_killed_at_many_points_the_outcome_is_the_same(tmp_path_factory, kills):
    folder = tmp_path_factory.mktemp("kills")
    assert torch.equal(drive(folder / "a", kills, False)["k"], drive(folder / "b", frozenset(), False)["k"])


def test_a_disk_that_is_full_leaves_the_last_state(tmp_path, monkeypatch):
    coordinator = started()
    coordinator.save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    send(coordinator, "ada")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("deltaloom.files.os.fsync", full)
    with pytest.raises(Exception, match="no space"):
        coordinator.save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before


# Masks.

def masked_round(gone: dict[str, str], **changes: object) -> tuple[Coordinator, list[str]]:
    """One round with masks; `gone`: party -> the first phase of the first attempt that it does not answer."""
    coordinator = started(masks=True, rounds=1, **changes)
    seen, now, halves = [], 0.0, {}
    for _ in range(30):
        told = {name: coordinator.told(name) for name in NAMES}
        phases = coordinator.phases
        lost = {name for name, phase in gone.items() if coordinator.attempt == 1 and coordinator.phase >= phases.index(phase)}
        able = [name for name in NAMES if told[name].wanted and name not in lost]
        for name in able[:1]:
            label, secret = told[name].label, name.encode().ljust(32, b".")
            half = halves.setdefault((name, label), Masks().half(name, label, secret))
            answer = half.answer(told[name].ticket.phase, told[name].told, values(name, 1), count(name, 1))
            seen += whats(coordinator.submit(name, told[name].ticket, answer, now).happened)
        if not able and not coordinator.done:
            now += 101
            seen += whats(coordinator.tick(now))
    return coordinator, seen


def close_to(coordinator: Coordinator, parties: tuple[str, ...]) -> None:
    for name, expected in oracle(parties, 1).items():
        assert torch.allclose(coordinator.common[name].double(), expected.double(), atol=1e-6 if name == "k" else 1e-2)


@pytest.mark.parametrize("phase", Masks.phases)
def test_masked_rounds_survive_a_lost_party(phase):
    coordinator, seen = masked_round({"bob": phase})
    close_to(coordinator, NAMES if phase == "unmask" else ("ada", "cyd"))
    assert "restarted" not in seen


def test_a_masked_round_begins_again_when_too_few_are_left():
    coordinator, seen = masked_round({"bob": "collect", "cyd": "collect"})
    assert seen.count("restarted") == 1 and coordinator.attempt == 2
    close_to(coordinator, NAMES)


def test_shares_that_fit_nothing_restart_the_round_instead_of_spoiling_it():
    coordinator = started(masks=True, rounds=1)
    while coordinator.attempt == 1:
        for name in NAMES:
            told = coordinator.told(name)
            half = Masks().half(name, told.label, name.encode().ljust(32, b"."))
            answer = half.answer(told.ticket.phase, told.told, values(name, 1), count(name, 1))
            if told.ticket.phase == "unmask":
                answer = Answer({other: share ^ 7 for other, share in answer.tensors.items()})
            happened = whats(coordinator.submit(name, told.ticket, answer, 0.0).happened)
    assert "restarted" in happened and coordinator.version == 0
    assert_common(coordinator, common())


def test_the_coordinators_file_holds_no_single_update_when_masked(tmp_path):
    coordinator = started(masks=True, rounds=1)
    canary = {"k": torch.full((2, 3), 0.123456789), "v": torch.ones(4, dtype=torch.bfloat16)}
    files = []
    while not coordinator.done:
        for name in NAMES:
            told = coordinator.told(name)
            half = Masks().half(name, told.label, name.encode().ljust(32, b"."))
            coordinator.submit(name, told.ticket, half.answer(told.ticket.phase, told.told, canary, 3), 0.0)
            coordinator.save(tmp_path / "state")
            files.append((tmp_path / "state").read_bytes())
    plain = canary["k"].numpy().tobytes()[:4]
    fixed = round(0.123456789 * 3 * 2**24).to_bytes(8, "little")
    assert not any(plain in data or fixed in data for data in files[:-1])
