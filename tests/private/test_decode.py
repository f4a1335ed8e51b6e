"""Split inference writes the tokens that the whole model writes."""

from dataclasses import replace

import pytest
import torch

from deltaloom.deltas.prefix import Prefix
from deltaloom.errors import RefusedError, UsageError
from deltaloom.generate import generate, stream
from deltaloom.private.back import Back, BackSettings
from deltaloom.private.cut import split
from deltaloom.private.decode import Writer
from deltaloom.private.local import LocalChannel
from deltaloom.private.messages import BusyError, ExtendRequest, ForgottenError, OpenRequest, Rows
from deltaloom.private.sessions import SessionSettings
from deltaloom.tuned import attach
from tests.private.pieces import three_blocks
from tests.private.test_remote import prefix
from tests.toy_tokenizers import byte_level

PROMPTS = [[5, 9, 11, 20], [7], [33, 12, 3, 40, 41, 8, 22], [10, 11], [50, 51, 52]]
LAYOUTS = ["llama", "gpt2", "qwen3", "gemma", "phi", "phi3"]


def pair(layout, settings=None, window=1, methods=None):
    model = three_blocks(layout)
    whole = attach(model, methods or prefix(layout))
    front, back = split(three_blocks(layout), "causal-lm", 1)
    tuned = attach(front.model, methods or prefix(layout))
    serving = Back(back, settings)
    return whole, Writer(tuned, front, LocalChannel(serving, window=window), byte_level()), serving


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_tokens_are_those_of_the_whole_model(layout):
    whole, writer, serving = pair(layout)
    expected = generate(whole, byte_level(), PROMPTS, max_new_tokens=12, batch_size=1)
    assert writer.generate(PROMPTS, max_new_tokens=12) == expected
    assert len(set(expected)) > 1
    assert len(serving.sessions) == 0


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_stream_draws_what_the_whole_model_draws(temperature):
    whole, writer, serving = pair("llama")
    options = {"max_new_tokens": 15, "temperature": temperature, "top_p": 0.9, "seed": 4}
    assert list(writer.stream(PROMPTS[2], **options)) == list(stream(whole, byte_level(), PROMPTS[2], **options))
    assert len(serving.sessions) == 0


def test_sessions_at_once_change_nothing_and_wait_for_room():
    _, writer, _ = pair("llama", BackSettings(sessions=SessionSettings(per_party=2)), window=3)
    one = writer.generate(PROMPTS, max_new_tokens=8, at_once=1)
    assert writer.generate(PROMPTS, max_new_tokens=8, at_once=4) == one
    _, full, _ = pair("llama", BackSettings(sessions=SessionSettings(total_tokens=9)))
    with pytest.raises(BusyError, match="room"):
        replace(full, patience=0.0).generate(PROMPTS[:1], max_new_tokens=8)


def test_an_owner_that_forgets_loses_nothing():
    whole, writer, serving = pair("llama")
    expected = list(stream(whole, byte_level(), PROMPTS[0], max_new_tokens=12))
    found = []
    for index, piece in enumerate(writer.stream(PROMPTS[0], max_new_tokens=12)):
        found.append(piece)
        if index in (1, 4):
            serving.forget("party")
    assert "".join(found) == "".join(expected)


def rows(hidden, offset):
    return Rows(hidden, (len(hidden),), (offset,), "padded")


def test_the_rules_of_a_session():
    now = [0.0]
    _, _, serving = pair("llama", BackSettings(sessions=SessionSettings(per_party=1, tokens=6, idle_seconds=10)))
    serving.sessions.clock = lambda: now[0]
    hidden = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ForgottenError):
        serving.answer("a", ExtendRequest("s", rows(hidden, 0)))
    with pytest.raises(RefusedError, match="length"):
        serving.answer("a", OpenRequest("s", 7))
    serving.answer("a", OpenRequest("s", 6))
    with pytest.raises(BusyError):
        serving.answer("a", OpenRequest("other", 2))
    first = serving.answer("a", ExtendRequest("s", rows(hidden, 0)))
    assert serving.answer("a", ExtendRequest("s", rows(hidden, 0))) is first  # a repeat
    with pytest.raises(RefusedError, match="where it ended"):
        serving.answer("a", ExtendRequest("s", rows(hidden, 1)))
    with pytest.raises(RefusedError, match="reserved"):
        serving.answer("a", ExtendRequest("s", rows(hidden, 4)))
    with pytest.raises(ForgottenError):  # another party's session is not there
        serving.answer("b", ExtendRequest("s", rows(hidden[:1], 4)))
    now[0] = 11.0
    with pytest.raises(ForgottenError):
        serving.answer("a", ExtendRequest("s", rows(hidden[:1], 4)))


def test_a_prompt_in_pieces_is_the_prompt():
    _, _, serving = pair("gpt2")
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for session in ("whole", "pieces"):
        serving.answer("a", OpenRequest(session, 8))
    whole = serving.answer("a", ExtendRequest("whole", rows(hidden, 0), logits=True))
    serving.answer("a", ExtendRequest("pieces", rows(hidden[:2], 0)))
    pieces = serving.answer("a", ExtendRequest("pieces", rows(hidden[2:], 2), logits=True))
    torch.testing.assert_close(pieces.logits, whole.logits, rtol=1e-5, atol=1e-5)


def test_what_cannot_write_says_so():
    front, back = split(three_blocks("llama"), "causal-lm", 1, head="party")
    tuned = attach(front.model, [Prefix(length=2, init="random")])
    with pytest.raises(RefusedError, match="writes no text"):
        Writer(tuned, front, LocalChannel(Back(back)), byte_level())
    with pytest.raises(RefusedError, match="writes no text"):
        Back(back).answer("a", OpenRequest("s", 3))
    _, writer, _ = pair("llama")
    with pytest.raises(UsageError):
        writer.generate([[]])
