"""Joint rounds over Flower's messages, in memory: the written-out mean, and what comes from outside is judged first."""

from __future__ import annotations

import itertools
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed: it does not fit constraints.txt, see docs/private.md#flower")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from deltaloom.errors import DataError, RefusedError
from deltaloom.private import flower
from deltaloom.private.coordinating import DurableRounds
from deltaloom.private.flower import answer, answer_of, arrays_of, hold_rounds, record_of, stand_of, tensors_of
from deltaloom.private.guards.masks import Masks
from deltaloom.private.means.median import Median
from deltaloom.private.means.trimmed import Trimmed
from deltaloom.private.means.weighted import Weighted
from deltaloom.private.round_messages import AnswerRequest, Phase, StandReply
from deltaloom.private.rounds import Coordinator, RoundSettings
from tests.private.rounds_oracle import NAMES, common, count, oracle, values
from tests.private.test_mailbox import Party, stand

pytestmark = pytest.mark.timeout(60)
NODES = dict(zip((11, 12, 13), NAMES, strict=True))
NODE = {name: node for node, name in NODES.items()}


def train(node: int, message: Message) -> Message:
    """What a party answers, told apart from others by its node."""
    told = stand_of(message.content)
    if not told.wanted:
        return Message(RecordDict(), reply_to=message)
    name = NODES[node]
    given = AnswerRequest(told.phase, values(name, told.phase.round), count(name, told.phase.round))
    return Message(record_of(given), reply_to=message)


class Grid:
    """A federation in memory: messages are bytes in between, as they are in earnest."""

    def __init__(self, nodes=NODES, app=train) -> None:
        self.nodes, self.app, self.replies, self.sent, self.ids = list(nodes), app, {}, [], itertools.count()
        self.answers = True

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        given = []
        for message in messages:
            id, node = str(next(self.ids)), message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = id
            self.sent.append((node, message))
            if (reply := self.app(node, message)) is not None:
                self.replies[id] = reply
            given.append(id)
        return given

    def pull_messages(self, ids):
        return [self.replies.pop(id) for id in list(ids) if id in self.replies]


@pytest.fixture(autouse=True)
def in_memory(monkeypatch):
    """As if a server's app ran in this process; a node that failed is asked again at once."""
    for number, name in enumerate(("_task_id", "_run_id", "_node_id"), 1):
        monkeypatch.setattr(TaskIdentity, name, number)
    monkeypatch.setattr(flower, "REST", 0.0)


def rounds(place: Path, *, mean=None, clock=lambda: 0.0, tell=lambda each: None, **changes) -> DurableRounds:
    chosen = RoundSettings(**{"rounds": 2, "parties": 3, "quorum": 3, "deadline": 100.0} | changes)
    return DurableRounds(Coordinator(chosen, mean or Weighted(), common(), run="r"), place, clock=clock, tell=tell)


def held(grid: Grid, machine: DurableRounds, said=None, **changes):
    said = [] if said is None else said
    return hold_rounds(grid, machine, **{"pause": 0.0, "farewell": 1.0, "say": said.append} | changes)


def assert_same(one, two):
    assert set(one) == set(two)
    assert all(one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one)


# What travels.

def test_every_tensor_of_a_delta_arrives_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (0,), (1,), (3, 0, 2), (2, 3), (4, 1, 5), (70, 300)]
    given = {f"{index}:{dtype}": torch.randn(shape, generator=generator).to(dtype)
             for index, shape in enumerate(shapes) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    given["turned"] = torch.randn(3, 5, generator=generator).T
    found = tensors_of(arrays_of(given))
    assert list(found) == list(given)
    for name, tensor in given.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name].to(tensor.dtype), tensor)


def test_what_float32_does_not_hold_is_refused():
    with pytest.raises(DataError, match="without loss"):
        arrays_of({"a": torch.zeros(1, dtype=torch.float64), "b": torch.zeros(1, dtype=torch.int64)})


def test_messages_arrive_as_they_were():
    told = stand(3, common=common())
    found = stand_of(record_of(told))
    assert (found.phase, found.label, found.wanted, found.done) == (told.phase, told.label, True, False)
    assert_same({name: tensor.to(common()[name].dtype) for name, tensor in found.common.items()}, common())
    given = AnswerRequest(Phase(3, 1, "collect", 2), {"a": torch.ones(2)}, 17)
    again = answer_of(record_of(given))
    assert (again.phase, again.count) == (given.phase, 17)
    assert_same(again.values, given.values)


def test_only_tensors_and_the_number_of_rows_reach_the_server():
    record = record_of(AnswerRequest(Phase(1, 1, "collect", 0), {"a": torch.ones(2)}, 17))
    assert {name: sorted(part) for name, part in record.items()} == {
        "round": ["attempt", "format", "phase", "round", "version"], "values": ["a"], "rows": ["num-examples"]}


def npy(array: np.ndarray) -> bytes:
    return Array(array).data


ONES = npy(np.ones((2, 3), "<f4"))
LIE = ONES.replace(b"(2, 3), }" + b" " * 12, b"(2000000000, 3000), }")
BAD_ARRAYS = {
    "another type": Array(np.ones((2, 3), "<f8")),
    "a type that is not said": Array("float32", (2, 3), "numpy.ndarray", npy(np.ones((2, 3), "<f8"))),
    "big-endian": Array("float32", (2, 3), "numpy.ndarray", npy(np.ones((2, 3), ">f4"))),
    "another form": Array("float32", (2, 3), "pickle", ONES),
    "a shape that lies": Array("float32", (2000000000, 3000), "numpy.ndarray", ONES),
    "both lie": Array("float32", (2000000000, 3000), "numpy.ndarray", LIE),
    "another shape within": Array("float32", (3, 2), "numpy.ndarray", ONES),
    "below zero": Array("float32", (-2, -3), "numpy.ndarray", ONES),
    "cut": Array("float32", (2, 3), "numpy.ndarray", ONES[:-1]),
    "more than there is": Array("float32", (2, 3), "numpy.ndarray", ONES + b"1234"),
    "columns first": Array("float32", (2, 3), "numpy.ndarray", npy(np.asfortranarray(np.ones((2, 3), "<f4")))),
    "objects": Array("float32", (2,), "numpy.ndarray", ONES.replace(b"'<f4'", b"'|O' ")),
    "no header": Array("float32", (2, 3), "numpy.ndarray", b""),
    "a header that is code": Array("float32", (2, 3), "numpy.ndarray", ONES.replace(b"False", b"f(1) ")),
    "many dimensions": Array(np.ones((1,) * 9, "<f4")),
}


@pytest.mark.parametrize("bad", BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_an_array_that_is_not_what_it_says_is_refused_before_it_gets_room(bad):
    tracemalloc.start()
    with pytest.raises(DataError, match="no tensors of a delta") as error:
        tensors_of(ArrayRecord({"good": Array(np.ones(2, "<f4")), "bad": bad}))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(error.value.problems) == 1 and most < 2 ** 20


def test_five_thousand_damaged_arrays_are_tensors_of_that_shape_or_refused():
    generator, fates = np.random.default_rng(0), set()
    for _ in range(5000):
        data = bytearray(ONES)
        for _ in range(generator.integers(1, 4)):
            data[generator.integers(len(data))] = generator.integers(256)
        if generator.integers(4) == 0:
            del data[generator.integers(len(data)):]
        try:
            found = tensors_of(ArrayRecord({"a": Array("float32", (2, 3), "numpy.ndarray", bytes(data))}))
            assert found["a"].shape == (2, 3) and found["a"].dtype == torch.float32
            fates.add("read")
        except DataError:
            fates.add("refused")
    assert fates == {"read", "refused"}


def changed(**fields) -> RecordDict:
    record = record_of(AnswerRequest(Phase(1, 1, "collect", 0), {"a": torch.ones(2)}, 17))
    plain = {name: value for name, value in (dict(record["round"]) | fields).items() if value is not None}
    return RecordDict({"round": ConfigRecord(plain), "values": record["values"], "rows": record["rows"]})


def without(name: str) -> RecordDict:
    return RecordDict({key: part for key, part in changed().items() if key != name})


BAD_MESSAGES = {
    "nothing": RecordDict(), "no rows": without("rows"), "no values": without("values"), "no round": without("round"),
    "more": RecordDict(dict(changed()) | {"more": ConfigRecord()}),
    "of another kind": RecordDict(dict(changed()) | {"values": ConfigRecord()}),
    "another format": changed(format=2), "a field is missing": changed(phase=None), "a field more": changed(code="x"),
    "text for a number": changed(round="1"), "true for a number": changed(round=True), "below zero": changed(version=-1),
    "very large": changed(round=2 ** 40), "a long text": changed(phase="x" * 1000),
    "rows that are no number": RecordDict(dict(changed()) | {"rows": MetricRecord({"num-examples": 1.5})}),
    "rows and more": RecordDict(dict(changed()) | {"rows": MetricRecord({"num-examples": 1, "loss": 0.5})}),
}


@pytest.mark.parametrize("bad", BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_a_message_that_is_none_of_ours_is_refused(bad):
    with pytest.raises(DataError):
        answer_of(bad)
    with pytest.raises(DataError):
        stand_of(bad)


# Rounds.

def test_the_common_values_are_the_written_out_mean(tmp_path):
    grid, told = Grid(), []
    found = held(grid, rounds(tmp_path / "r", tell=lambda each: told.append(each.what)))
    assert_same(found, oracle(NAMES, 2))
    assert [what for what in told if what in ("published", "done")] == ["published", "published", "done"]
    asked = [(node, stand_of(message.content)) for node, message in grid.sent]
    assert sorted((node, one.phase.round) for node, one in asked if one.wanted) == sorted((n, r) for n in NODES for r in (1, 2))
    last = [one for _, one in asked if one.done]   # and all are told how it ended
    assert len(last) == 3
    for one in last:
        assert_same({name: tensor.to(found[name].dtype) for name, tensor in one.common.items()}, found)


@pytest.mark.parametrize("mean", [Trimmed(), Median()], ids=["trimmed", "median"])
def test_robust_means_are_those_of_the_middle(tmp_path, mean):
    found = held(Grid(), rounds(tmp_path / "r", mean=mean, rounds=1))
    for name, tensor in common().items():
        middle = torch.stack([values(party, 1)[name].double() for party in NAMES]).median(0).values
        assert torch.equal(found[name], middle.to(tensor.dtype))


def test_a_long_change_is_shortened_to_the_bound(tmp_path):
    found = held(Grid(), rounds(tmp_path / "r", rounds=1, norm_bound=0.5))
    total, mean = 0, {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in common().items()}
    for party in NAMES:
        change = {name: values(party, 1)[name].double() - common()[name].double() for name in common()}
        norm = sum(float(part.square().sum()) for part in change.values()) ** 0.5
        assert norm > 0.5
        total += count(party, 1)
        for name, part in change.items():
            mean[name] += count(party, 1) * (common()[name].double() + part * 0.5 / norm)
    for name, tensor in common().items():
        torch.testing.assert_close(found[name], (mean[name] / total).to(tensor.dtype), rtol=1e-6, atol=1e-6)


def hostile(kind: str):
    """An app of which one node once does not do what it should."""
    once = []

    def app(node, message):
        told = stand_of(message.content)
        if node != NODE["bob"] or not told.wanted or once:
            return train(node, message)
        once.append(node)
        good = values("bob", told.phase.round)
        given = AnswerRequest(told.phase, good, 5)
        if kind == "error":
            return Message(Error(2, "no"), reply_to=message)
        if kind == "not finite":
            given = AnswerRequest(told.phase, good | {"k": torch.full((2, 3), float("nan"))}, 5)
        if kind == "shape":
            given = AnswerRequest(told.phase, good | {"k": torch.zeros(3, 2)}, 5)
        if kind == "names":
            given = AnswerRequest(told.phase, good | {"more": torch.zeros(1)}, 5)
        if kind == "future":
            given = AnswerRequest(Phase(9, 1, "collect", 8), good, 5)
        if kind == "count":
            given = AnswerRequest(told.phase, good, 0)
        if kind == "foreign":
            return Message(RecordDict({"x": ConfigRecord({"a": 1})}), reply_to=message)
        return Message(record_of(given), reply_to=message)
    return app


@pytest.mark.parametrize("kind", ["error", "not finite", "shape", "names", "future", "count", "foreign"])
def test_a_bad_answer_is_said_and_the_node_is_asked_again(tmp_path, kind):
    said = []
    found = held(Grid(app=hostile(kind)), rounds(tmp_path / "r"), said)
    assert_same(found, oracle(NAMES, 2))
    assert len(said) == 1 and said[0].startswith(f"Node {NODE['bob']}: ")


def test_a_node_cannot_answer_for_another(tmp_path):
    said = []

    def app(node, message):
        reply = train(node, message)
        if node == NODE["bob"] and not said:
            reply.metadata.__dict__["_src_node_id"] = NODE["ada"]
        return reply
    assert_same(held(Grid(app=app), rounds(tmp_path / "r"), said), oracle(NAMES, 2))
    assert len(said) == 1 and "another node" in said[0]


def test_a_node_that_flower_gave_up_is_not_waited_for(tmp_path):
    def app(node, message):
        if node == NODE["cyd"] and stand_of(message.content).phase.round == 2:
            grid.nodes.remove(node)
            return None
        return train(node, message)
    grid = Grid(app=app)
    assert_same(held(grid, rounds(tmp_path / "r", quorum=2)), oracle(("ada", "bob"), 2))


def test_a_round_closes_at_its_deadline_and_what_comes_later_is_not_used(tmp_path):
    now, said, kept = itertools.count(), [], []

    def app(node, message):
        told = stand_of(message.content)
        if node == NODE["cyd"] and told.wanted and told.phase.round == 1:
            kept.append(message)
            return None
        if told.phase.round == 2 and kept:   # while the second round is open
            late = kept.pop()
            grid.replies[late.metadata.message_id] = train(NODE["cyd"], late)
        return train(node, message)
    grid = Grid(app=app)
    found = held(grid, rounds(tmp_path / "r", quorum=2, deadline=40.0, clock=lambda: float(next(now))), said)
    assert_same(found, oracle(NAMES, 2))
    assert len(said) == 1 and "after its deadline" in said[0]


def test_messages_that_flower_does_not_take_are_sent_again(tmp_path):
    class Full(Grid):
        pushed = 0

        def push_messages(self, messages):
            self.pushed += 1
            if self.pushed == 1:
                return []
            return [None, *super().push_messages(messages[1:])] if self.pushed == 2 else super().push_messages(messages)
    said = []
    assert_same(held(Full(), rounds(tmp_path / "r"), said), oracle(NAMES, 2))
    assert len(said) == 2


def test_started_anew_the_rounds_go_on_from_their_checkpoint(tmp_path):
    class Stopped(Exception):
        pass

    def app(node, message):
        if stand_of(message.content).phase.round == 2 and node == NODE["bob"]:
            raise Stopped
        return train(node, message)
    with pytest.raises(Stopped):
        held(Grid(app=app), rounds(tmp_path / "r"))
    grid = Grid()
    assert_same(held(grid, rounds(tmp_path / "r")), oracle(NAMES, 2))
    assert {stand_of(message.content).phase.round for _, message in grid.sent} == {2}


def test_parties_that_do_not_take_the_end_are_not_waited_for_long(tmp_path):
    def app(node, message):
        return train(node, message) if stand_of(message.content).wanted else None
    began = time.monotonic()
    assert_same(held(Grid(app=app), rounds(tmp_path / "r"), farewell=0.05), oracle(NAMES, 2))
    assert time.monotonic() - began < 30  # a minute is the default


def test_guards_of_updates_are_refused(tmp_path):
    chosen = RoundSettings(rounds=1, parties=3, quorum=3)
    machine = DurableRounds(Coordinator(chosen, Weighted(), common(), run="r", guard=Masks()), tmp_path / "r")
    with pytest.raises(RefusedError, match="holds itself"):
        held(Grid(), machine)
    told = StandReply(Phase(1, 1, "keys", 0), "r/1/1", True, False, told={"keys": {"ada": torch.zeros(1)}}, common=common())
    with pytest.raises(RefusedError, match="holds itself"):
        record_of(told)


def test_a_clients_app_carries_messages_to_the_mailbox_and_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    party = Party(Path("a.sock"), tmp_path)
    given = stand()
    message = Message(record_of(given), 11, flower.TRAIN)
    reply = answer(message, "a.sock")
    assert answer_of(reply.content).count == 10 and reply.metadata.src_node_id == 11
    last = Message(record_of(stand(wanted=False, done=True)), 11, flower.TRAIN)
    assert not answer(last, "a.sock").content
    assert set(party.over()) == set(given.common)
