"""Messages to frames and back: each kind of message has a pair of functions, and nothing else knows both sides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltaloom.private.messages import (
    CloseRequest,
    DoneReply,
    ExtendReply,
    ExtendRequest,
    GradientReply,
    GradientRequest,
    Key,
    LossReply,
    LossRequest,
    OpenRequest,
    OutputsReply,
    OutputsRequest,
    Rows,
    ScoreReply,
    ScoreRequest,
)
from deltaloom.private.refused import Refused
from deltaloom.private.round_messages import AnswerReply, AnswerRequest, LeaveRequest, Phase, StandReply, StandRequest
from deltaloom.private.wire.codecs import codec_named
from deltaloom.private.wire.frame import encode_frame
from deltaloom.private.wire.integers import decode_integers, encode_integers
from deltaloom.private.wire.schema import CROSSING, INTEGERS, KINDS, LOSSLESS, RAW, VALUES, WIDE, Bounds, Head, TensorHead

NOWHERE = Key(0, 0)   # of frames that belong to no step
Tensors = Mapping[str, Tensor]
TOLD, COMMON = "told", "common"   # first part of a tensor's name in a reply about the rounds
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Hello:
    """What a party says first on a stream: which run it belongs to, what for, and what the policy has to allow."""

    run: str
    purpose: str
    package: str
    codec: str
    cut: int
    method: str
    guards: list[str]
    labels: str
    fingerprint: str


@dataclass(frozen=True)
class Welcome:
    """The owner's answer: the back's facts, the window, limits, and the audit log's head for later comparison."""

    facts: dict[str, Any]
    window: int
    limits: dict[str, Any]
    audit: str


@dataclass(frozen=True)
class Refusal:
    """Why a request, or a whole stream (id 0), was turned away."""

    reason: str
    message: str


@dataclass(frozen=True)
class Parts:
    """A message taken apart: its kind, its key, plain fields, and tensors by name."""

    kind: str
    key: Key = NOWHERE
    fields: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A message as header and buffers, before it is known whose and which frame it is: the same bytes may be sent again."""

    header: dict[str, Any]
    buffers: list[bytes]

    def frame(self, *, id: int, party: str) -> bytes:
        """The whole frame."""
        return encode_frame({**self.header, "id": id, "party": party}, self.buffers)

    @property
    def bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(map(len, self.buffers))


def prepare(message: Any, codec: str) -> Prepared:
    """A message in the form in which it travels.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity. RefusedError: negative places or labels.
    """
    parts = _APART[type(message)](message)
    groups = {entry.name: entry.group for entry in KINDS[parts.kind].tensors}
    listed, buffers = [], []
    for name, tensor in parts.tensors.items():
        used, dtype, raw = _encode(tensor, groups.get(name, VALUES), codec)
        listed.append([name, used, dtype, list(tensor.shape)])
        buffers.append(raw)
    header = {"kind": parts.kind, "step": parts.key.step, "micro": parts.key.micro, "fields": parts.fields, "tensors": listed}
    return Prepared(header, buffers)


def encode_message(message: Any, *, id: int, party: str, codec: str) -> bytes:
    """The frame of a message; raises as `prepare` does."""
    return prepare(message, codec).frame(id=id, party=party)


def decode_message(head: Head, body: memoryview, bounds: Bounds) -> Any:
    """The message of a checked frame; its tensors share no memory with the body.

    Raises:
        Refused: "non-finite" values, or places and labels that are out of range.
    """
    parts = {name: body[one.start:one.start + one.size] for name, one in head.tensors.items()}
    for name, one in head.tensors.items():   # all of them before the first tensor is made
        if one.dtype in DTYPES and not codec_named(one.codec).finite(parts[name], one.shape):
            raise Refused("non-finite", f"'{name}' holds NaN or infinity", got=f"step {head.step}, micro-batch {head.micro}",
                          legal="finite values")
    tensors = {name: _decode(one, parts[name]) for name, one in head.tensors.items()}
    for name, limit in (("places", head.tokens), ("labels", bounds.outputs or 2 ** 32)):
        if name in tensors and tensors[name].numel() and int(tensors[name].max()) >= limit:
            raise Refused("shape", f"'{name}' are out of range", got=int(tensors[name].max()), legal=f"0 to {limit - 1}")
    return _TOGETHER[head.kind.name](head, tensors)


def expected(message: Any, bounds: Bounds) -> dict[str, int]:
    """The sizes that the reply to a request must have."""
    if isinstance(message, (LossRequest, ScoreRequest)):
        return {"tokens": int(message.rows.hidden.shape[0]), "places": int(message.places.shape[0])}
    if isinstance(message, OutputsRequest):
        columns = bounds.width if message.output == "hidden" else bounds.outputs
        return {"places": int(message.places.shape[0]), "columns": columns}
    return {}


def _encode(tensor: Tensor, group: str, codec: str) -> tuple[str, str, bytes]:
    tensor = tensor.detach().contiguous().cpu()
    if group == INTEGERS:
        width, raw = encode_integers(tensor)
        return width, "int64", raw
    if tensor.dtype == torch.uint8:
        return RAW, "uint8", tensor.numpy().tobytes()
    if tensor.dtype == torch.int64:
        return WIDE, "int64", tensor.numpy().astype("<i8").tobytes()
    used = codec if group == CROSSING else LOSSLESS
    return used, str(tensor.dtype).removeprefix("torch."), codec_named(used).encode(tensor.to(torch.float32))


def _decode(one: TensorHead, raw: memoryview) -> Any:
    if one.codec == RAW:
        return torch.frombuffer(bytearray(raw) or bytearray(1), dtype=torch.uint8)[:len(raw)].reshape(one.shape)
    if one.codec == WIDE:
        return torch.frombuffer(bytearray(raw) or bytearray(8), dtype=torch.int64)[:len(raw) // 8].reshape(one.shape)
    if one.dtype == "int64":
        return decode_integers(raw, one.codec)
    return codec_named(one.codec).decode(raw, one.shape).to(DTYPES[one.dtype])


def _rows_apart(rows: Rows) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return {"lengths": list(rows.lengths), "offsets": list(rows.offsets), "layout": rows.layout}, {"hidden": rows.hidden}


def _rows(head: Head, tensors: Tensors) -> Rows:
    fields = head.fields
    return Rows(tensors["hidden"], tuple(fields["lengths"]), tuple(fields["offsets"]), fields["layout"])


def _loss_apart(message: LossRequest) -> Parts:
    fields, tensors = _rows_apart(message.rows)
    weights = None if message.weights is None else [float(weight) for weight in message.weights]
    return Parts("loss", message.key, {**fields, "weights": weights},
                 {**tensors, "places": message.places, "labels": message.labels})


def _loss(head: Head, tensors: Tensors) -> LossRequest:
    weights = head.fields["weights"]
    return LossRequest(_key(head), _rows(head, tensors), tensors["places"], tensors["labels"],
                       None if weights is None else tuple(weights))


def _outputs_apart(message: OutputsRequest) -> Parts:
    fields, tensors = _rows_apart(message.rows)
    return Parts("outputs", message.key, {**fields, "output": message.output, "keep": message.keep},
                 {**tensors, "places": message.places})


def _outputs(head: Head, tensors: Tensors) -> OutputsRequest:
    return OutputsRequest(_key(head), _rows(head, tensors), tensors["places"], head.fields["output"], head.fields["keep"])


def _gradient_apart(message: GradientRequest) -> Parts:
    if message.forward is None:
        return Parts("gradient", message.key, {}, {"gradient": message.gradient})
    again = _outputs_apart(message.forward)
    return Parts("gradient-again", message.key, again.fields, {"gradient": message.gradient, **again.tensors})


def _extend_apart(message: ExtendRequest) -> Parts:
    fields, tensors = _rows_apart(message.rows)
    return Parts("extend", NOWHERE, {**fields, "session": message.session, "logits": message.logits}, tensors)


def _extended_apart(message: ExtendReply) -> Parts:
    return Parts("extend-reply", NOWHERE, {"token": message.token}, {} if message.logits is None else {"logits": message.logits})


def _score_apart(message: ScoreRequest) -> Parts:
    fields, tensors = _rows_apart(message.rows)
    return Parts("score", message.key, fields, {**tensors, "places": message.places, "labels": message.labels})


def _stand_apart(message: StandReply) -> Parts:
    fields = {**vars(message.phase), "label": message.label, "wanted": message.wanted, "done": message.done,
              "seconds": None if message.seconds is None else float(message.seconds), "has_common": message.common is not None}
    told = {f"{TOLD}/{phase}/{name}": value for phase, values in message.told.items() for name, value in values.items()}
    # A phase in which nothing is told is told as well.
    empty = {f"{TOLD}/{phase}/": torch.empty(0, dtype=torch.uint8) for phase, values in message.told.items() if not values}
    return Parts("stand-reply", NOWHERE, fields,
                 {**told, **empty, **{f"{COMMON}/{name}": value for name, value in (message.common or {}).items()}})


def _stand(head: Head, tensors: Tensors) -> StandReply:
    fields = head.fields
    told: dict[str, dict[str, Tensor]] = {}
    common: dict[str, Tensor] = {}
    for path, value in tensors.items():
        where, _, name = path.partition("/")
        phase, _, inner = name.partition("/")
        if where == COMMON and fields["has_common"]:
            common[name] = value
        elif where == TOLD and inner:
            told.setdefault(phase, {})[inner] = value
        elif where == TOLD and phase:
            told.setdefault(phase, {})
        else:
            raise Refused("schema", "the reply about the rounds holds an unknown tensor", got=path[:80])
    return StandReply(_phase(head), fields["label"], fields["wanted"], fields["done"], fields["seconds"], told,
                      common if fields["has_common"] else None)


def _answer_apart(message: AnswerRequest) -> Parts:
    return Parts("answer", NOWHERE, {**vars(message.phase), "count": message.count}, dict(message.values))


def _phase(head: Head) -> Phase:
    return Phase(**{name: head.fields[name] for name in ("round", "attempt", "phase", "version")})


def _key(head: Head) -> Key:
    return Key(head.step, head.micro)


_APART: dict[type, Callable[[Any], Parts]] = {
    Hello: lambda message: Parts("hello", NOWHERE, vars(message)),
    Welcome: lambda message: Parts("welcome", NOWHERE, vars(message)),
    Refusal: lambda message: Parts("refusal", NOWHERE, vars(message)),
    LossRequest: _loss_apart,
    LossReply: lambda message: Parts("loss-reply", NOWHERE, {}, {"loss": message.loss, "gradient": message.gradient}),
    OutputsRequest: _outputs_apart,
    OutputsReply: lambda message: Parts("outputs-reply", NOWHERE, {}, {"outputs": message.outputs}),
    GradientRequest: _gradient_apart,
    GradientReply: lambda message: Parts("gradient-reply", NOWHERE, {}, {"gradient": message.gradient}),
    ScoreRequest: _score_apart,
    ScoreReply: lambda message: Parts("score-reply", NOWHERE, {}, {"losses": message.losses}),
    OpenRequest: lambda message: Parts("open", NOWHERE, vars(message)),
    ExtendRequest: _extend_apart,
    ExtendReply: _extended_apart,
    CloseRequest: lambda message: Parts("close", NOWHERE, vars(message)),
    DoneReply: lambda message: Parts("done"),
    StandRequest: lambda message: Parts("stand", NOWHERE, vars(message)),
    StandReply: _stand_apart,
    AnswerRequest: _answer_apart,
    AnswerReply: lambda message: Parts("answer-reply", NOWHERE, vars(message)),
    LeaveRequest: lambda message: Parts("leave"),
}
_TOGETHER: dict[str, Callable[[Head, Tensors], Any]] = {
    "hello": lambda head, _: Hello(**head.fields),
    "welcome": lambda head, _: Welcome(**head.fields),
    "refusal": lambda head, _: Refusal(**head.fields),
    "loss": _loss,
    "loss-reply": lambda _, tensors: LossReply(tensors["loss"], tensors["gradient"]),
    "outputs": _outputs,
    "outputs-reply": lambda _, tensors: OutputsReply(tensors["outputs"]),
    "gradient": lambda head, tensors: GradientRequest(_key(head), tensors["gradient"]),
    "gradient-again": lambda head, tensors: GradientRequest(_key(head), tensors["gradient"], _outputs(head, tensors)),
    "gradient-reply": lambda _, tensors: GradientReply(tensors["gradient"]),
    "score": lambda head, tensors: ScoreRequest(_key(head), _rows(head, tensors), tensors["places"], tensors["labels"]),
    "score-reply": lambda _, tensors: ScoreReply(tensors["losses"]),
    "open": lambda head, _: OpenRequest(**head.fields),
    "extend": lambda head, tensors: ExtendRequest(head.fields["session"], _rows(head, tensors), head.fields["logits"]),
    "extend-reply": lambda head, tensors: ExtendReply(head.fields["token"], tensors.get("logits")),
    "close": lambda head, _: CloseRequest(**head.fields),
    "done": lambda *_: DoneReply(),
    "stand": lambda head, _: StandRequest(**head.fields),
    "stand-reply": _stand,
    "answer": lambda head, tensors: AnswerRequest(_phase(head), dict(tensors), head.fields["count"]),
    "answer-reply": lambda head, _: AnswerReply(**head.fields),
    "leave": lambda *_: LeaveRequest(),
}
