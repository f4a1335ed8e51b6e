"""Rounds that another engine brings to a socket: the same outcome as over our own wire, and callers that are turned away."""

from __future__ import annotations

import importlib
import socket
import sys
import threading
from pathlib import Path

import pytest
import torch

from deltaloom.errors import DataError, NonFiniteError, SettingsError, UsageError
from deltaloom.private import mailbox
from deltaloom.private.joining import Participant
from deltaloom.private.mailbox import Mailbox, carry
from deltaloom.private.round_messages import AnswerRequest, LeaveRequest, Phase, StandReply, StandRequest
from deltaloom.private.settings import parse_private

pytestmark = pytest.mark.timeout(60)
OWN = {"0:block.1:down": torch.zeros(2, 3), "0:block.1:up": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A short name: the folder of a test may be too long for a socket."""
    monkeypatch.chdir(tmp_path)
    return Path("a.sock")


def stand(round_: int = 1, *, wanted=True, done=False, common=OWN, **changes) -> StandReply:
    return StandReply(Phase(round_, 1, "collect", round_ - 1), f"run/{round_}/1", wanted, done, common=common, **changes)


def plus(common, by):
    return {name: tensor + by for name, tensor in common.items()}


def assert_same(one, two):
    assert set(one) == set(two)
    assert all(one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one)


class Party:
    """A participant in a thread of its own, as its process would be."""

    def __init__(self, place: Path, folder: Path, train=lambda number, common: (plus(common, number), 10 * number)) -> None:
        self.said: list[str] = []
        self.box = Mailbox(place, "ada", OWN, say=self.said.append)
        self.end = None
        someone = Participant("ada", folder, self.box.ask, train, wait=lambda stand: None)
        self.thread = threading.Thread(target=lambda: setattr(self, "end", someone.run()), daemon=True)
        self.thread.start()

    def over(self):
        self.thread.join(20)
        self.box.close()
        return self.end


def test_a_party_answers_each_round_and_ends_with_the_last_values(place, tmp_path):
    party = Party(place, tmp_path)
    first = carry(stand(1), place)
    assert first.phase == stand(1).phase and first.count == 10
    assert_same(first.values, plus(OWN, 1))
    second = carry(stand(2, common=first.values), place)
    assert_same(second.values, plus(first.values, 2))
    assert carry(stand(2, wanted=False, done=True, common=second.values), place) is None
    assert_same(party.over(), second.values)
    assert not place.exists()


def test_a_repeat_gets_the_same_answer_without_training_again(place, tmp_path):
    trained = []

    def train(number, common):
        trained.append(number)
        return plus(common, torch.rand(1).item()), 5
    party = Party(place, tmp_path, train)
    one, two = carry(stand(), place), carry(stand(), place)
    assert trained == [1] and one.count == two.count
    assert_same(one.values, two.values)
    carry(stand(wanted=False, done=True), place)
    party.over()


def test_a_caller_that_is_gone_before_the_answer_may_come_again(place, tmp_path):
    gone = threading.Event()

    def train(number, common):
        gone.wait(20)
        return plus(common, 1), 5
    party = Party(place, tmp_path, train)
    with mailbox._reached(place, 5) as caller:
        mailbox._receive(caller, mailbox._bounds(OWN), asks=True)
        mailbox._send(caller, stand(), "")
    gone.set()
    assert carry(stand(), place).count == 5
    carry(stand(wanted=False, done=True), place)
    party.over()
    assert any("could not be handed over" in line for line in party.said)


BAD = {
    "a tensor is missing": stand(common={"0:block.1:down": torch.zeros(2, 3)}),
    "a stray tensor": stand(common=OWN | {"more": torch.zeros(1)}),
    "another shape": stand(common=OWN | {"0:block.1:down": torch.zeros(3, 2)}),
    "whole numbers": stand(common=OWN | {"0:block.1:down": torch.zeros(2, 3, dtype=torch.int64)}),
    "too many values": stand(common=OWN | {"0:block.1:down": torch.zeros(1000, 1000)}),
    "no values": stand(common=None),
    "a guard's words": stand(told={"keys": {"bob": torch.zeros(3, dtype=torch.uint8)}}),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_what_does_not_fit_is_turned_away_and_the_party_goes_on_waiting(bad, place, tmp_path):
    party = Party(place, tmp_path)
    with pytest.raises(DataError, match="its own log says why"):
        carry(bad, place)
    assert carry(stand(), place).count == 10
    carry(stand(wanted=False, done=True), place)
    party.over()
    assert sum("turned away" in line for line in party.said) == 1


@pytest.mark.parametrize("words", [b"", b"\xff\xff\xff\x7f", b"\x04\x00\x00\x00GET ", b"\x10\x00\x00\x00" + bytes(16), b"\x05"])
def test_bytes_that_are_no_frame_are_turned_away(words, place, tmp_path):
    party = Party(place, tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.connect(str(place))
        caller.sendall(words)
    carry(stand(wanted=False, done=True), place)
    assert party.over() is not None and any("turned away" in line for line in party.said)


def test_values_that_are_not_finite_never_leave_or_arrive(place, tmp_path):
    party = Party(place, tmp_path)
    with pytest.raises(NonFiniteError):
        carry(stand(common=OWN | {"0:block.1:down": torch.full((2, 3), float("nan"))}), place)
    carry(stand(wanted=False, done=True), place)
    party.over()


def test_a_mailbox_is_made_once_and_a_killed_ones_file_is_replaced(place, tmp_path):
    box = Mailbox(place, "ada", OWN)
    assert place.stat().st_mode & 0o777 == 0o660
    with pytest.raises(UsageError, match="another process waits"):
        Mailbox(place, "ada", OWN)
    box._listener.close()   # as a kill would: the file stays
    assert place.exists()
    Mailbox(place, "ada", OWN).close()
    place.write_text("mine")
    with pytest.raises(UsageError, match="something else"):
        Mailbox(place, "ada", OWN)
    with pytest.raises(UsageError, match="no mailbox can be made"):
        Mailbox(Path("none/a.sock"), "ada", OWN)
    with pytest.raises(SettingsError, match="too long"):
        Mailbox(Path("x" * 101), "ada", OWN)


def test_nobody_there_is_said_and_an_early_answer_is_late(place):
    with pytest.raises(UsageError, match="does not wait"):
        carry(stand(), place, patience=0.0)
    box = Mailbox(place, "ada", OWN)
    assert box.ask(AnswerRequest(stand().phase, OWN, 1)).status == "late"
    box.ask(LeaveRequest())
    box.close()


def test_an_answer_to_another_round_is_none(place):
    def answer(box):
        box.ask(StandRequest())
        box.ask(AnswerRequest(stand(7).phase, OWN, 1))
        box.close()
    box = Mailbox(place, "ada", OWN, say=lambda text: None)
    thread = threading.Thread(target=answer, args=(box,))
    thread.start()
    with pytest.raises(DataError, match="no answer to this round"):
        carry(stand(1), place)
    thread.join(20)


def test_masks_and_a_mailbox_exclude_one_another():
    assert parse_private({"mailbox": "rounds.sock"}).mailbox == "rounds.sock"
    with pytest.raises(SettingsError, match="own rounds only"):
        parse_private({"mailbox": "rounds.sock", "update_guard": "masks"})


def test_without_flwr_the_bridge_says_what_to_install(monkeypatch):
    for name in ("flwr", "flwr.app", "flwr.serverapp"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "deltaloom.private.flower", raising=False)
    with pytest.raises(UsageError, match=r"docs/private\.md"):
        importlib.import_module("deltaloom.private.flower")
