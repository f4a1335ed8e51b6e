"""Parties and coordinator together, over messages: the written-out mean, also when any of them is killed anywhere."""

import contextlib

import pytest
import torch

from deltaloom.errors import CheckpointError, DataError, ResourceError
from deltaloom.private.coordinating import DurableRounds
from deltaloom.private.guards.masks import Masks
from deltaloom.private.joining import Participant
from deltaloom.private.means.weighted import Weighted
from deltaloom.private.round_messages import AnswerRequest, Coordinating, LeaveRequest, StandRequest
from deltaloom.private.rounds import Coordinator, RoundSettings
from tests.private.rounds_oracle import NAMES, common, count, oracle, values


class Killed(Exception):
    """A process died here."""


class World:
    """Three parties and a coordinator in one thread: whoever waits lets the next go on; any write or reply may be the last."""

    def __init__(self, folder, guard=None, kills: frozenset[int] = frozenset()) -> None:
        self.folder, self.guard, self.kills, self.step, self.trained = folder, guard, kills, 0, []
        self.events: list[str] = []
        self.coordinator = self.open()

    def open(self) -> DurableRounds:
        settings = RoundSettings(rounds=2, parties=3, quorum=3, deadline=1e9)
        machine = Coordinator(settings, Weighted(), common(), run="r", guard=self.guard)
        return DurableRounds(machine, self.folder / "owner", clock=lambda: 0.0, tell=lambda each: self.events.append(each.what))

    def point(self, owner: bool = False) -> None:
        """A place where a process may die."""
        self.step += 1
        if self.step in self.kills:
            if owner:
                self.coordinator = self.open()
            raise Killed

    def participant(self, name: str) -> Participant:
        def ask(request):
            for attempt in range(2):  # the owner may be gone: ask again
                try:
                    self.point(owner=True)
                    reply = self.coordinator.answer(name, request)
                    self.point(owner=True)
                    break
                except Killed:
                    if attempt:
                        raise
            self.point()
            return reply

        def train(round_, common):
            self.trained.append((name, round_))
            return values(name, round_), count(name, round_)

        def wait(stand):
            raise StopIteration
        (self.folder / name).mkdir(exist_ok=True)
        return Participant(name, self.folder / name, ask, train, wait=wait, guard=self.guard,
                           secret=name.encode().ljust(32, b"."))

    def run(self):
        ends, turns = {}, 0
        while len(ends) < 3 and turns < 400:
            for name in NAMES:
                turns += 1
                with contextlib.suppress(StopIteration, Killed):
                    ends[name] = self.participant(name).run()
        return ends


@pytest.mark.parametrize("guard", (None, Masks()), ids=("plain", "masks"))
def test_all_end_with_the_written_out_mean(tmp_path, guard):
    world = World(tmp_path, guard)
    ends = world.run()
    expected = oracle(NAMES, 2)
    for name in NAMES:
        assert torch.allclose(ends[name]["k"], expected["k"], atol=1e-6 if guard else 0)
        assert torch.equal(ends[name]["k"], ends["ada"]["k"])
    assert sorted(world.trained) == sorted((name, round_) for name in NAMES for round_ in (1, 2))
    assert world.events.count("published") == 2 and world.events[-1] == "done"


@pytest.mark.parametrize("guard", (None, Masks()), ids=("plain", "masks"))
def test_killed_anywhere_the_outcome_is_the_same(tmp_path, guard):
    (tmp_path / "whole").mkdir()
    whole = World(tmp_path / "whole", guard)
    expected = whole.run()["ada"]
    for step in range(1, whole.step, 3 if guard is None else 17):
        (tmp_path / str(step)).mkdir()
        ends = World(tmp_path / str(step), guard, frozenset({step, step + 5, step + 11})).run()
        for name in NAMES:
            assert all(torch.equal(ends[name][key], expected[key]) for key in expected)


@pytest.mark.parametrize("step", range(14, 26))
def test_what_was_trained_is_not_trained_again(tmp_path, step):
    world = World(tmp_path, None, frozenset({step, step + 1}))
    world.run()
    assert sorted(world.trained) == sorted((name, round_) for name in NAMES for round_ in (1, 2))


def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path, monkeypatch):
    world = World(tmp_path)
    rounds: Coordinating = world.coordinator
    for name in NAMES:
        phase = rounds.answer(name, StandRequest()).phase

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")
    request = AnswerRequest(phase, values("ada", 1), 3)
    with monkeypatch.context() as patch:
        patch.setattr("deltaloom.files.os.fsync", full)
        with pytest.raises(ResourceError):
            rounds.answer("ada", request)
    assert rounds.answer("ada", request).status == "repeat"
    again = world.open()
    assert again.answer("ada", request).status == "repeat"  # and it is on the disk
    assert world.events.count("accepted") == 1


def test_standing_tells_what_is_new_and_leaving_ends_the_waiting(tmp_path):
    world = World(tmp_path)
    first = world.coordinator.answer("ada", StandRequest(join=False))
    assert first.common is not None and not first.wanted and world.coordinator.coordinator.members == ()
    assert world.coordinator.answer("ada", StandRequest(have=0)).common is None
    world.coordinator.answer("ada", LeaveRequest())
    assert world.coordinator.coordinator.members == ()
    world.coordinator.tick()


def test_damaged_files_of_a_party_are_named(tmp_path):
    world = World(tmp_path, Masks())
    for name in NAMES:
        world.coordinator.answer(name, StandRequest())
    (tmp_path / "ada").mkdir()
    (tmp_path / "ada" / "round.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        world.participant("ada").run()
    (tmp_path / "ada" / "round.safetensors").unlink()
    (tmp_path / "ada" / "guard.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        world.participant("ada").run()


def test_replies_of_another_kind_are_refused(tmp_path):
    member = Participant("ada", tmp_path, lambda request: None, lambda *_: ({}, 0), wait=lambda _: None)
    with pytest.raises(DataError):
        member.run()
