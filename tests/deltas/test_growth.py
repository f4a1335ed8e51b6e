"""Growing on demand: methods with adaptive ranks begin small, grow without changing what the model says, and end as they grew."""

from __future__ import annotations

import pytest
import torch

from deltaloom.deltas.adalora import AdaLoRA
from deltaloom.deltas.base import Method, StepPlan
from deltaloom.deltas.lora import LoRA
from deltaloom.deltas.tsvd import TSVD
from deltaloom.deltas.tucker1 import Tucker1
from deltaloom.events import Emitter, RankChanged
from deltaloom.tuned import Tuned, attach
from tests.toys import toy, toy_batch

SHARED = {"rank": 1, "reserve": 4, "targets": ("q", "k"), "start": 0.0, "end": 0.1}
METHODS = {"adalora": AdaLoRA(**SHARED), "entries": TSVD(**SHARED, transform="haar"),
           "tubes": TSVD(**SHARED, transform="dft", granularity="tube"), "rows": Tucker1(**SHARED, basis="random")}


def training_logits(tuned: Tuned) -> torch.Tensor:
    with torch.no_grad():
        return tuned(**toy_batch("llama", labels=False)).logits


@pytest.mark.parametrize("name", METHODS)
def test_it_begins_small_grows_silently_and_ends_as_it_grew(name: str) -> None:
    tuned, events = attach(toy("llama"), [METHODS[name]]), []
    (controller,) = tuned.controllers(StepPlan(100, Emitter([events.append]), on_demand=True))
    whole, start = tuned.counts()[0], tuned.counts()[0] - controller.reserve()
    assert 0 < start < whole
    optimizer = torch.optim.Adam(tuned.delta_parameters().values(), lr=1e-2)
    tuned.train()
    for step in range(1, 5):
        optimizer.zero_grad()
        (tuned(**toy_batch("llama")).loss + tuned.penalty()).backward()
        controller.after_backward(step)
        optimizer.step()
        controller.after_step(step)
    assert tuned.counts()[0] - controller.reserve() == start  # no schedule of its own
    assert controller.grow(2.0, 0) == 0
    before = training_logits(tuned)
    grown = controller.grow(2.0, None)
    assert grown > 0 and tuned.counts()[0] - controller.reserve() == start + grown
    assert torch.equal(training_logits(tuned), before)
    assert [type(event) for event in events] == [RankChanged]
    state = controller.state_dict()
    controller.load_state_dict(state)
    kept = controller.reserve()
    controller.finish()
    assert tuned.counts()[0] == whole - kept and controller.reserve() == 0
    assert controller.grow(2.0, None) == 0


def test_it_grows_to_the_end_of_its_reserve_and_no_further() -> None:
    tuned = attach(toy("llama"), [METHODS["adalora"]])
    (controller,) = tuned.controllers(StepPlan(100, on_demand=True))
    sizes = [controller.grow(2.0, None) for _ in range(4)]
    one = 4 * (16 + 1) + 2 * 16 + 2 * 8  # q is 16 to 16, k is 16 to 8, in two layers each
    assert sizes == [one, 2 * one, 0, 0] and controller.reserve() == 0


def test_a_trained_delta_is_not_cut_down() -> None:
    tuned = attach(toy("llama"), [METHODS["adalora"]])
    with torch.no_grad():
        for _, delta in tuned.pairs():
            delta.triplets.core.fill_(0.1)
    before = training_logits(tuned)
    (controller,) = tuned.controllers(StepPlan(100, on_demand=True))
    assert controller.reserve() == 0 and torch.equal(training_logits(tuned), before)


def test_without_the_plans_word_nothing_waits() -> None:
    methods: list[Method] = [METHODS["adalora"], LoRA(rank=2)]
    tuned = attach(toy("llama"), methods)
    (controller,) = tuned.controllers(StepPlan(100))
    assert controller.reserve() == 0 and controller.grow(2.0, None) == 0
