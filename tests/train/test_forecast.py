"""What a run will take: counted bytes are those of the rows together, trying changes nothing, what cannot fit is refused."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from deltaloom.data.encode import Example
from deltaloom.deltas.route import Route
from deltaloom.errors import ResourceError
from deltaloom.train.budget import steps_that_fit
from deltaloom.train.forecast import Trial, check_memory, forecast, saved_bytes
from deltaloom.train.modes import faster_dropout, training_mode
from deltaloom.train.settings import TrainSettings
from deltaloom.train.team import SINGLE
from tests.toys import toy
from tests.train.pieces import LanguageTask, assert_same, feed, rows, small, state_of, tuned_model

TASK = LanguageTask()


def trial(tuned, examples, **settings):
    chosen = TrainSettings(**{"batch_size": 8, **settings})
    return Trial(tuned, TASK, feed(chosen, examples, micro_tokens=64), chosen, [example.length for example in examples])


def same_width(count, width=12):
    return [Example(row, [3 + (row + at) % 15 for at in range(width)], [3] * width, width) for row in range(count)]


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_rows_of_a_width_keep_as_much_each(layout):
    tuned = tuned_model(model=toy(layout))
    source = feed(TrainSettings(batch_size=8), same_width(8))
    with training_mode(tuned, True), faster_dropout(tuned):
        one, eight = (saved_bytes(tuned, TASK, source.batch(range(count), tuned.device)) for count in (1, 8))
    assert eight == pytest.approx(8 * one, rel=0.02)  # masks of positions are there once
    assert one > 0


def test_the_need_is_that_of_the_largest_micro_batch_with_the_optimizer():
    tuned, examples = tuned_model(), rows(24)
    tried = trial(tuned, examples)
    largest = max((micro for step in tried.feed.steps(0) for micro in step), key=tried.padded)
    with training_mode(tuned, True), faster_dropout(tuned):
        counted = saved_bytes(tuned, TASK, tried.batch(largest))
    numbers = sum(parameter.numel() for parameter in tuned.delta_parameters().values())
    assert tried.need - 12 * numbers == pytest.approx(counted, rel=0.05)


ROUTE = Route(delta={"method": "prefix", "length": 2}, pool=2, top=1)  # counts texts while training


@pytest.mark.parametrize("methods", [None, [ROUTE]], ids=["lora", "route"])
def test_trying_changes_nothing(methods):
    tuned = tuned_model(methods)
    before, own = state_of(tuned), {name: tensor.clone() for name, tensor in tuned.model.state_dict().items()}
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    tried = trial(tuned, rows(24), weight_decay=0.5)
    found = forecast(tried, steps=30)
    with training_mode(tuned, True):
        steps_that_fit(tuned, TASK, tried.feed, 60.0, SINGLE)
    drawn = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert drawn == (random.random(), np.random.rand(), float(torch.rand(())))
    assert_same(before, state_of(tuned))
    assert_same(own, tuned.model.state_dict())
    assert all(parameter.grad is None for parameter in tuned.parameters())
    assert not tuned.training and found.seconds > 0


def test_twice_the_steps_take_twice_the_time():
    tried = trial(tuned_model(), rows(24))
    ratio = [forecast(tried, steps=200).seconds / forecast(tried, steps=100).seconds for _ in range(5)]
    assert 1.2 < float(np.median(ratio)) < 3.3


def test_what_cannot_fit_is_refused_with_what_to_change():
    tried = trial(tuned_model(), rows(24))
    need = tried.need
    check_memory(tried, free=need)
    with pytest.raises(ResourceError, match="gradient_checkpointing") as found:
        check_memory(tried, free=need - 1)
    assert "max_length" in str(found.value)


def test_a_row_wider_than_can_be_tried_is_counted_in_proportion(monkeypatch):
    monkeypatch.setattr("deltaloom.train.forecast.WIDEST", 6)
    tried = trial(tuned_model(model=small(0.0)), [*same_width(4, 6), *same_width(4, 12)])
    exact = trial(tuned_model(model=small(0.0)), same_width(8, 12))
    monkeypatch.undo()
    assert tried.need == pytest.approx(exact.need, rel=0.35)  # attention's part grows with the square
