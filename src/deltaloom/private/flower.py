"""The bridge to Flower, for those who run it already: its engine carries joint rounds, what happens in them is ours.

    ServerApp: hold_rounds   [ DurableRounds: quorum, deadline, norm bound, mean, checkpoint ] <-> messages
    ClientApp: answer        message <-> the mailbox of the party's own process, which has model and data in memory

A message has what `round_messages` says, and nothing else crosses: the delta's tensors and, in an answer, the number of rows.

    "round"   ConfigRecord: where the rounds stand, or which phase is answered
    "values"  ArrayRecord: the tensors by name, float32
    "rows"    MetricRecord, in an answer: "num-examples", Flower's own word for it

Flower authenticates nodes and encrypts if it is set up to; update guards (`masks`) are for rounds that the owner holds itself.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaloom.errors import DataError, DeltaloomError, RefusedError, UsageError
from deltaloom.private.coordinating import DurableRounds
from deltaloom.private.mailbox import carry
from deltaloom.private.round_messages import AnswerReply, AnswerRequest, LeaveRequest, Phase, StandReply, StandRequest

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import Grid
except ImportError:
    raise UsageError("the bridge to Flower needs the package 'flwr'", hint="docs/private.md says how it is installed.") from None

FORMAT = 1
ROUND, VALUES, ROWS, COUNT = "round", "values", "rows", "num-examples"
TRAIN = "train"            # the type of our messages; an app handles it with @app.train()
MOST_TEXT = 200
REST = 5.0                 # seconds before a node that failed is asked again
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PHASE: dict[str, type] = {"round": int, "attempt": int, "phase": str, "version": int}
STAND: dict[str, type] = {"format": int, "label": str, "wanted": bool, "done": bool, **PHASE}
Say = Callable[[str], None]


def hold_rounds(grid: Grid, rounds: DurableRounds, *, pause: float = 1.0, farewell: float = 60.0,
                say: Say = print) -> dict[str, Tensor]:
    """A ServerApp's main: all rounds, with whatever nodes the federation has; the common values at the end.

    Nodes that come take part from the next round on, nobody waits for those that Flower gave up. A node whose answer failed or
    does not fit is asked again until the round's deadline. Started anew with the same checkpoint the rounds go on. `pause`:
    seconds between two looks for answers; `farewell`: seconds that the parties have at the end to take the last common values.

    Raises:
        RefusedError: the rounds have an update guard. ResourceError: the disk is full. Whatever `grid` raises.
    """
    if rounds.coordinator.guard is not None:
        raise RefusedError("guards of updates are for rounds that the owner holds itself", got=rounds.coordinator.guard.name)
    post = _Post(grid, say)
    while not rounds.coordinator.done:
        wanted = {node: stand for node, stand in _stands(grid, rounds).items() if stand.wanted}
        post.bring(wanted, rounds.coordinator.settings.deadline)
        for node, answer in post.fetch():
            _hand_in(rounds, node, answer, say)
        rounds.tick()
        if not rounds.coordinator.done:
            time.sleep(pause)
    _part(post, grid, rounds, pause, farewell)
    return dict(rounds.coordinator.common)


def answer(message: Message, mailbox: Path | str, *, patience: float = 60.0) -> Message:
    """A ClientApp's `train`: bring a message to the party's process that waits at `mailbox`, and give back what it answers.

    Raises:
        UsageError: nobody waits there for `patience` seconds. DataError: the message is none of ours, or the party did not take
            it. Flower tells the server the text of an error, which names no path and nothing of the data.
    """
    stand = stand_of(message.content)
    found = carry(stand, Path(mailbox), patience=patience)
    return Message(RecordDict() if found is None else record_of(found), reply_to=message)


def record_of(what: StandReply | AnswerRequest) -> RecordDict:
    """A message of joint rounds as Flower's records.

    Raises:
        DataError: a tensor is no float32, bfloat16 or float16. RefusedError: it tells something for an update guard.
    """
    if isinstance(what, AnswerRequest):
        return RecordDict({ROUND: ConfigRecord({"format": FORMAT, **vars(what.phase)}), VALUES: arrays_of(what.values),
                           ROWS: MetricRecord({COUNT: what.count})})
    if what.told:
        raise RefusedError("guards of updates are for rounds that the owner holds itself", got=sorted(what.told))
    fields = {"format": FORMAT, "label": what.label, "wanted": what.wanted, "done": what.done, **vars(what.phase)}
    return RecordDict({ROUND: ConfigRecord(fields), VALUES: arrays_of(what.common or {})})


def stand_of(content: RecordDict) -> StandReply:
    """Where the rounds stand, from a message of the server.

    Raises:
        DataError: it is none of ours; nothing was given room that is not there already.
    """
    fields = _fields(content, {ROUND: ConfigRecord, VALUES: ArrayRecord}, STAND)
    return StandReply(_phase(fields), fields["label"], fields["wanted"], fields["done"], common=tensors_of(content[VALUES]))


def answer_of(content: RecordDict) -> AnswerRequest:
    """A party's answer; whether names, shapes and values fit the round, `rounds.Coordinator` checks.

    Raises:
        DataError: it is none of ours.
    """
    fields = _fields(content, {ROUND: ConfigRecord, VALUES: ArrayRecord, ROWS: MetricRecord}, {"format": int, **PHASE})
    rows = dict(content[ROWS])
    if set(rows) != {COUNT} or type(rows[COUNT]) is not int:
        raise DataError("an answer has to say how many rows it is of", got=_short(rows), legal=f"{COUNT}: a whole number")
    return AnswerRequest(_phase(fields), tensors_of(content[VALUES]), rows[COUNT])


def arrays_of(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as arrays of float32, which hold bfloat16 and float16 exactly.

    Raises:
        DataError: another type.
    """
    wrong = [f"'{name}' is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in FLOATS]
    if wrong:
        raise DataError("these tensors cannot travel as float32 without loss", legal=FLOATS, problems=wrong[:20])
    plain = {name: tensor.detach().cpu().to(torch.float32).contiguous() for name, tensor in tensors.items()}
    return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in plain.items()})


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """Arrays as tensors that share no memory with them; an array that is not as long as its shape says is not opened.

    Raises:
        DataError: an array is no float32 in NumPy's form, or its parts contradict one another.
    """
    problems, tensors = [], {}
    for name, array in record.items():
        start = _start(array)
        if start is None:
            problems.append(f"'{_short(name)}': {_short(array.dtype)} {_short(array.shape)} as {_short(array.stype)}, "
                            f"{len(array.data)} bytes")
        else:
            values = np.frombuffer(array.data, "<f4", offset=start) if len(array.data) > start else np.empty(0, "<f4")
            tensors[name] = torch.from_numpy(values.copy()).reshape(tuple(array.shape))
    if problems:
        raise DataError("these arrays are no tensors of a delta", legal="float32 as numpy.ndarray", problems=problems[:20])
    return tensors


def _start(array: Array) -> int | None:
    """Where the values begin in an array's bytes; None if it is not what it says."""
    shape = tuple(array.shape)
    if array.dtype != "float32" or array.stype != "numpy.ndarray" or len(shape) > 8 \
            or not all(type(size) is int and size >= 0 for size in shape):
        return None
    source = io.BytesIO(array.data)
    try:
        if np.lib.format.read_magic(source) != (1, 0):
            return None
        stored, reversed_order, dtype = np.lib.format.read_array_header_1_0(source)
    except Exception:   # it reads a Python literal: what can go wrong has many names, and all mean the same
        return None
    same = stored == shape and dtype == np.dtype("<f4") and (not reversed_order or len(shape) < 2)
    return source.tell() if same and len(array.data) - source.tell() == 4 * math.prod(shape) else None


def _fields(content: RecordDict, records: Mapping[str, type], legal: Mapping[str, type]) -> dict[str, Any]:
    """The plain fields of a message that has these records and no others."""
    found = {str(name): type(record).__name__ for name, record in content.items()}
    if found != {name: kind.__name__ for name, kind in records.items()}:
        raise DataError("this message is not of deltaloom's rounds", got=_short(found), legal=sorted(records))
    fields = dict(content[ROUND])
    wrong = [f"{name}: {_short(fields.get(name))}" for name, kind in legal.items() if type(fields.get(name)) is not kind]
    wrong += [f"{_short(name)}: an unknown field" for name in fields if name not in legal]
    wrong += [f"{name}: {_short(value)}" for name, value in fields.items()
              if (type(value) is str and len(value) > MOST_TEXT) or (type(value) is int and not 0 <= value < 2 ** 31)]
    if not wrong and fields["format"] != FORMAT:
        wrong.append(f"format: {fields['format']}, not {FORMAT}")
    if wrong:
        raise DataError("this message of a round has illegal fields", problems=wrong[:20])
    return fields


def _phase(fields: Mapping[str, Any]) -> Phase:
    return Phase(**{name: fields[name] for name in PHASE})


def _stands(grid: Grid, rounds: DurableRounds) -> dict[str, StandReply]:
    """Where the rounds stand for each node that Flower has now; those that it no longer has are not waited for."""
    nodes = sorted(map(str, grid.get_node_ids()))
    for gone in set(rounds.coordinator.members) - set(nodes):
        rounds.answer(gone, LeaveRequest())
    replies = {node: rounds.answer(node, StandRequest()) for node in nodes}
    return {node: stand for node, stand in replies.items() if isinstance(stand, StandReply)}


def _hand_in(rounds: DurableRounds, node: str, answer: AnswerRequest, say: Say) -> None:
    try:
        reply = rounds.answer(node, answer)
    except (DataError, RefusedError) as error:
        say(f"Node {node}: {error}")
        return
    if isinstance(reply, AnswerReply) and reply.status == "late":
        say(f"Node {node}: the answer to round {answer.phase.round} came after its deadline and is not used.")


def _part(post: _Post, grid: Grid, rounds: DurableRounds, pause: float, farewell: float) -> None:
    """Tell all nodes that the rounds are over, with the last common values."""
    until = time.monotonic() + farewell
    post.bring(_stands(grid, rounds), farewell)
    while post.waits and time.monotonic() < until:
        time.sleep(pause)
        for _ in post.fetch():
            pass


class _Post:
    """Messages under way: one for each node at a time."""

    def __init__(self, grid: Grid, say: Say) -> None:
        self._grid, self._say = grid, say
        self._under_way: dict[str, str] = {}
        self._rests: dict[str, float] = {}

    @property
    def waits(self) -> bool:
        """Whether any message is not answered yet."""
        return bool(self._under_way)

    def bring(self, stands: Mapping[str, StandReply], seconds: float) -> None:
        """Send to each node where the rounds stand, unless one is on its way to it or it has just failed."""
        busy, now = set(self._under_way.values()), time.monotonic()
        free = [node for node in stands if node not in busy and self._rests.get(node, 0.0) <= now]
        messages = [Message(record_of(stands[node]), int(node), TRAIN, ttl=seconds + 60.0,
                            group_id=str(stands[node].phase.round)) for node in free]
        if messages:
            sent = list(self._grid.push_messages(messages))   # None for what it did not take, [] if it was too much
            self._under_way |= {id: node for id, node in zip(sent, free, strict=False) if id}
            if not all(sent) or len(sent) < len(free):
                self._say("Flower did not take every message; its log says why. They are sent again.")
                self._rests |= dict.fromkeys(set(free) - set(self._under_way.values()), now + REST)

    def fetch(self) -> Iterator[tuple[str, AnswerRequest]]:
        """The answers that have come. What failed is said, and its node rests a little."""
        if not self._under_way:
            return
        for reply in self._grid.pull_messages(list(self._under_way)):
            node = self._under_way.pop(reply.metadata.reply_to_message_id, None)
            if node is None:
                continue
            try:
                if reply.has_error():
                    raise DataError("it gave no answer", got=f"{reply.error.code}: {_short(reply.error.reason)}")
                if str(reply.metadata.src_node_id) != node:
                    raise DataError("another node answered in its place", got=reply.metadata.src_node_id)
                if reply.content:
                    yield node, answer_of(reply.content)
            except DeltaloomError as error:
                self._say(f"Node {node}: {error}")
                self._rests[node] = time.monotonic() + REST


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
