"""The owner's side: what it answers alone, in company, when it forgot, and when it is asked wrongly."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from deltaloom.errors import DeltaloomError, RefusedError
from deltaloom.private.back import Back, BackSettings
from deltaloom.private.cut import split
from deltaloom.private.messages import (
    ForgottenError,
    GradientRequest,
    Key,
    LossRequest,
    OutputsReply,
    OutputsRequest,
    Rows,
    ScoreRequest,
)
from tests.private.pieces import run_split, settings_for, task_name, three_blocks
from tests.private.test_remote import prefix


def back_of(layout, head="owner", **settings):
    return Back(split(three_blocks(layout), task_name(layout), 1, head=head)[1], BackSettings(**settings))


def rows_of(lengths, seed=0, layout="padded", width=16):
    hidden = torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(seed))
    return Rows(hidden, tuple(lengths), (0,) * len(lengths), layout)


def loss_request(lengths=(4, 3), seed=0, step=1, classes=False):
    if classes:
        places = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        labels = torch.arange(len(lengths)) % 3
        return LossRequest(Key(step, 0), rows_of(lengths, seed, "masked"), places, labels, (1.0, 2.0, 3.0))
    places = torch.arange(sum(lengths) - 1)
    return LossRequest(Key(step, 0), rows_of(lengths, seed), places, torch.randint(0, 64, places.shape))


def together(back, requests, parties=None):
    """Answers of requests that wait at the same moment: all are in the queue before the first one gets the turn."""
    parties = parties or [f"party {index}" for index in range(len(requests))]
    with ThreadPoolExecutor(len(requests)) as pool:
        with back._turn:
            futures = [pool.submit(back.answer, party, request) for party, request in zip(parties, requests, strict=True)]
            threading.Event().wait(0.3)
            assert len(back._waiting) == len(requests)
        return futures


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert"])
def test_parties_answered_together_get_what_each_would_get_alone(layout):
    back = back_of(layout)
    requests = [loss_request(lengths, seed, classes=layout == "bert")
                for seed, lengths in enumerate([(4, 3), (9,), (2, 5, 6)])]
    alone = [back.answer("a", request) for request in requests]
    calls = []
    back._losses = lambda given, plain=back._losses: calls.append(len(given)) or plain(given)
    for future, expected in zip(together(back, requests), alone, strict=True):
        reply = future.result()
        torch.testing.assert_close(reply.loss, expected.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(reply.gradient, expected.gradient, rtol=1e-5, atol=1e-5)
    assert calls == [3]


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert"])
def test_what_one_party_has_under_way_is_never_joined(layout):
    """Else the bits of a run with a window would depend on when its micro-batches arrive."""
    back = back_of(layout)
    requests = [loss_request(lengths, seed, classes=layout == "bert")
                for seed, lengths in enumerate([(4, 3), (9,), (2, 5, 6)])]
    alone = [back.answer("a", request) for request in requests]
    for future, expected in zip(together(back, requests, ["a"] * 3), alone, strict=True):
        assert torch.equal(future.result().loss, expected.loss)
        assert torch.equal(future.result().gradient, expected.gradient)


def test_a_limit_of_tokens_cuts_the_company():
    back = back_of("llama", together_tokens=10)
    calls = []
    back._losses = lambda given, plain=back._losses: calls.append(len(given)) or plain(given)
    for future in together(back, [loss_request(seed=seed) for seed in range(3)]):
        future.result()
    assert calls == [1, 1, 1]


def test_a_wrong_request_hurts_nobody_else():
    back = back_of("llama")
    good = loss_request()
    wrong = [replace(good, labels=good.labels + 64), replace(loss_request(seed=3), places=good.places - 1)]
    futures = together(back, [good, *wrong])
    assert torch.isfinite(futures[0].result().loss)
    for future in futures[1:]:
        with pytest.raises(RefusedError):
            future.result()


@pytest.mark.parametrize("change, what", [
    ({"hidden": torch.zeros(7, 15)}, "hidden states"), ({"hidden": torch.zeros(7, 16, dtype=torch.long)}, "hidden states"),
    ({"hidden": torch.zeros(1, 7, 16)}, "hidden states"), ({"lengths": (4, 4)}, "lengths"), ({"lengths": (7, 0)}, "lengths"),
    ({"lengths": ()}, "lengths"), ({"offsets": (0,)}, "offsets"), ({"offsets": (0, -1)}, "offsets"),
    ({"offsets": (0, 5000)}, "a row of 5003 tokens"), ({"layout": "left"}, "layout"),
])
def test_rows_that_do_not_fit_are_refused(change, what):
    back, good = back_of("llama"), loss_request()
    with pytest.raises(RefusedError, match=what):
        back.answer("a", replace(good, rows=replace(good.rows, **change)))


@pytest.mark.parametrize("change", [{"places": torch.tensor([7])}, {"places": torch.tensor([[1]])},
                                    {"places": torch.tensor([0.5])},
                                    {"labels": torch.tensor([64] * 6)}, {"labels": torch.tensor([-1] * 6)},
                                    {"labels": torch.tensor([1])}, {"labels": torch.zeros(6)}])
def test_places_and_labels_that_do_not_fit_are_refused(change):
    with pytest.raises(RefusedError):
        back_of("llama").answer("a", replace(loss_request(), **change))


def test_a_classifier_reads_one_place_of_each_row():
    with pytest.raises(RefusedError, match="one place of every row"):
        back_of("bert").answer("a", replace(loss_request(classes=True), places=torch.tensor([0, 1])))


def test_without_a_head_the_owner_gives_hidden_states_only():
    back, good = back_of("llama", head="party"), loss_request()
    for request in (OutputsRequest(Key(1, 0), good.rows, good.places, "logits"),):
        with pytest.raises(RefusedError, match="head of this model is at the party"):
            back.answer("a", request)
    with pytest.raises(RefusedError):
        back.answer("a", good)
    assert back.answer("a", OutputsRequest(Key(1, 0), good.rows, good.places, "hidden")).outputs.shape == (6, 16)


def test_a_forward_pass_that_was_forgotten_is_computed_again():
    back, rows = back_of("llama", kept_forwards=1), rows_of((4, 3))
    first, second = (OutputsRequest(Key(1, micro), rows, torch.tensor([1, 5]), "hidden", keep=True) for micro in (0, 1))
    reply = back.answer("a", first)
    assert isinstance(reply, OutputsReply)
    upstream = torch.ones(2, 16)
    expected = back.answer("a", GradientRequest(first.key, upstream)).gradient
    assert torch.equal(back.answer("a", GradientRequest(first.key, upstream)).gradient, expected)  # a repeat
    with pytest.raises(ForgottenError):
        back.answer("b", GradientRequest(first.key, upstream))  # another party's
    back.answer("a", second)
    with pytest.raises(ForgottenError):
        back.answer("a", GradientRequest(first.key, upstream))
    assert torch.equal(back.answer("a", GradientRequest(first.key, upstream, first)).gradient, expected)
    with pytest.raises(RefusedError, match="another shape"):
        back.answer("a", GradientRequest(second.key, torch.ones(2, 15)))
    back.forget("a")
    with pytest.raises(ForgottenError):
        back.answer("a", GradientRequest(second.key, upstream))


def test_training_over_an_owner_that_keeps_nothing_is_the_same():
    settings = settings_for()
    kept = run_split("bert", three_blocks("bert"), prefix("bert"), settings, labels="home", head="party")
    front, owner = split(three_blocks("bert"), "sequence-classification", 1, head="party")
    again = run_split("bert", three_blocks("bert"), prefix("bert"), settings, labels="home", head="party",
                      back=Back(owner, BackSettings(kept_forwards=0)))
    assert kept.losses == again.losses and front.cut == 1
    assert all(torch.equal(tensor, again.state[key]) for key, tensor in kept.state.items())


def test_the_back_stays_as_it_is():
    model = three_blocks("llama")
    back = Back(split(model, "causal-lm", 1)[1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    request = loss_request()
    first, second = back.answer("a", request), back.answer("a", request)
    assert torch.equal(first.gradient, second.gradient)
    scores = back.answer("a", ScoreRequest(Key(1, 0), request.rows, request.places, request.labels)).losses
    torch.testing.assert_close(scores.sum(), first.loss)
    assert all(parameter.grad is None for parameter in back.half.model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_errors_of_the_owner_reach_the_party_through_the_backward_pass():
    def broken(request):
        return replace(request, labels=request.labels + 64) if isinstance(request, LossRequest) else request

    for window in (1, 3):
        with pytest.raises(DeltaloomError, match="label is outside"):
            run_split("llama", three_blocks("llama"), prefix("llama"), settings_for(), labels="owner", head="owner",
                      window=window, outward=broken)
