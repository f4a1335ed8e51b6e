"""What the tests of the wire share: bounds, messages of every kind, and frames of them."""

from __future__ import annotations

import torch

from deltaloom.private.messages import (
    BackFacts,
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
from deltaloom.private.round_messages import AnswerReply, AnswerRequest, LeaveRequest, Phase, StandReply, StandRequest
from deltaloom.private.wire.convert import Hello, Refusal, Welcome, decode_message, encode_message
from deltaloom.private.wire.frame import Assembler, Frame, chunks
from deltaloom.private.wire.schema import Bounds, check_header

WIDTH, VOCABULARY = 16, 40
BYTES = torch.tensor([0, 255, 7], dtype=torch.uint8)
FACTS = BackFacts("f" * 64, "toy", "causal-lm", 2, 4, WIDTH, VOCABULARY, 128, "float32")
BOUNDS = Bounds(width=WIDTH, outputs=VOCABULARY, positions=128, tokens=256, rows=8, values=10_000, session_tokens=128,
                codecs=frozenset({"fp32", "bf16", "int8"}))


def rows(lengths=(3, 2), offsets=None, *, width=WIDTH, seed=0, dtype=torch.float32) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sum(lengths), width, generator=generator).to(dtype)
    return Rows(hidden, tuple(lengths), tuple(offsets or [0] * len(lengths)), "packed")


def loss_request(step=1, micro=0, seed=0, **changes) -> LossRequest:
    return LossRequest(Key(step, micro), rows(seed=seed, **changes), torch.tensor([0, 1, 3]), torch.tensor([5, 6, 39]))


def outputs_request(step=1, micro=0, output="hidden", keep=True) -> OutputsRequest:
    return OutputsRequest(Key(step, micro), rows(), torch.tensor([1, 4]), output, keep)


def requests() -> list:
    """One request of each kind and shape that a party may send."""
    return [
        Hello("run-1", "training", "0.1.0", "fp32", 2, "toy", ["gaussian"], "owner", "f" * 64),
        loss_request(),
        LossRequest(Key(2, 1), rows((4,), dtype=torch.bfloat16), torch.tensor([3]), torch.tensor([1]), (0.5, 2.0)),
        outputs_request(), outputs_request(output="logits", keep=False),
        GradientRequest(Key(1, 0), torch.ones(2, WIDTH)), GradientRequest(Key(1, 0), torch.ones(2, WIDTH), outputs_request()),
        ScoreRequest(Key(1, 0), rows(), torch.tensor([0]), torch.tensor([7])),
        OpenRequest("s1", 64), ExtendRequest("s1", rows((5,))), ExtendRequest("s1", rows((1,), (5,)), True), CloseRequest("s1"),
        StandRequest(), LeaveRequest(),
        AnswerRequest(Phase(1, 1, "collect", 0), {"layer.0.keys": torch.randn(2, 3), "empty": torch.empty(0)}, 17),
        AnswerRequest(Phase(1, 2, "masks", 0), {"a": torch.tensor([2 ** 40, -3]), "b": BYTES}),
    ]


def replies() -> list:
    """One reply of each kind and shape that an owner may send."""
    return [
        Welcome({"width": WIDTH, "max_length": None}, 4, {"tokens": 256}, "12:" + "0" * 64), Refusal("late", "too late"),
        LossReply(torch.tensor(1.5), torch.randn(5, WIDTH)), OutputsReply(torch.randn(2, VOCABULARY)),
        GradientReply(torch.randn(5, WIDTH)), ScoreReply(torch.randn(3)), ExtendReply(3), ExtendReply(3, torch.randn(VOCABULARY)),
        DoneReply(), AnswerReply("late"), StandReply(Phase(3, 1, "collect", 2), "run/3/1", False, True),
        StandReply(Phase(1, 1, "shares", 0), "run/1/1", True, False, 2.5, {"keys": {}, "shares": {"b": BYTES}},
                   {"a": torch.randn(3), "layer/0": torch.randn(2, 2)}),
    ]


def frame_of(message, codec="fp32", id=7, party="a") -> bytes:
    return encode_message(message, id=id, party=party, codec=codec)


def assemble(data: bytes, *, asks: bool, bounds: Bounds = BOUNDS, size: int | None = None) -> Frame | None:
    """The frame of some bytes, taken apart as the service does; `size` of the chunks."""

    def judge(header):
        head = check_header(header, bounds, asks=asks)
        return head, head.size

    assembler = Assembler(judge, bounds.most_body)
    frame = None
    for chunk in chunks(data) if size is None else (data[i:i + size] for i in range(0, len(data), size)):
        frame = assembler.feed(chunk)
    assembler.finish()
    return frame


def received(message, *, asks: bool, codec="fp32", bounds: Bounds = BOUNDS):
    frame = assemble(frame_of(message, codec), asks=asks, bounds=bounds)
    return decode_message(frame.header, frame.body, bounds)


def assert_same(one, two) -> None:
    """Equal, tensors bit for bit."""
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif hasattr(one, "__dataclass_fields__"):
        assert_same(vars(one), vars(two))
    else:
        assert one == two
