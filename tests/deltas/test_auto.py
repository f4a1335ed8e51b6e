"""A choice among components of several methods: what stays, what it becomes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltaloom.checkpoint import native
from deltaloom.deltas._choice import Part
from deltaloom.deltas.auto import Auto
from deltaloom.deltas.base import StepPlan, method_record, methods_from
from deltaloom.deltas.lora import LoRA
from deltaloom.errors import RefusedError, SettingsError, TargetError
from deltaloom.events import Emitter, RankChanged, Warned
from deltaloom.train.checkpoints import read_checkpoint
from deltaloom.train.optimizer import row_keeper
from deltaloom.train.settings import TrainSettings
from deltaloom.tuned import Tuned, attach, settle
from tests.contract.cases import logits, perturb
from tests.toys import toy, toy_batch
from tests.train.pieces import Log, assert_same, held_out_loss, run, small, state_of

BUDGET = 420
CANDIDATES = ({"method": "lora", "rank": 3, "alpha": 6, "rank_pattern": {"q": 2}, "targets": ["q", "v", "down"]},
              {"method": "bottleneck", "size": 4, "bias": False},
              {"method": "bottleneck", "size": 2, "bias": False, "placement": "parallel", "targets": ["attention"]},
              {"method": "prefix", "length": 5},
              {"method": "bitfit", "targets": ["q", "down"], "new": True})
ROWS = {**CANDIDATES[0], "targets": ["q"]}, {"method": "prompt", "length": 6}


def auto(layout: str = "llama", **others: object) -> Auto:
    candidates = [record if layout == "llama" or record["method"] != "bitfit" else {"method": "bitfit"} for record in CANDIDATES]
    return Auto(**({"budget": BUDGET, "candidates": candidates, "start": 0.1, "end": 0.4, "every": 1} | others))


def parts(tuned: Tuned) -> dict[str, Part]:
    return {name: module for name, module in tuned.named_modules() if isinstance(module, Part)} or {
        f"{site.name} {key}": part for site, delta in tuned.pairs() for key, part in delta.parts.items()}


def trained(method: Auto, layout: str = "llama", steps: int = 10, remove: bool = True) -> tuple[Tuned, list[RankChanged]]:
    """A tuned model after a run, with the events of its decisions."""
    tuned, events = attach(toy(layout), [method], seed=1), []
    optimizer = torch.optim.Adam(tuned.delta_parameters().values(), lr=1e-2)
    keeper = row_keeper(optimizer) if remove else None
    (controller,) = tuned.controllers(StepPlan(steps, Emitter([events.append]), keeper))
    batch = toy_batch(layout)
    tuned.train()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        tuned(**batch).loss.backward()
        optimizer.step()
        controller.after_step(step)
    controller.finish()
    assert not [event for event in events if isinstance(event, Warned)]
    return tuned.eval(), [event for event in events if isinstance(event, RankChanged)]


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert", "t5"])
def test_what_stays_is_a_plain_list_that_says_the_same(layout: str, tmp_path: Path) -> None:
    tuned, events = trained(auto(layout), layout)
    assert 0 < tuned.counts()[0] <= BUDGET
    assert [event.budget for event in events] == sorted((event.budget for event in events), reverse=True)
    assert events[-1].parameters == tuned.counts()[0]
    kinds = {name.split(" ")[0] for name, rows in events[-1].ranks.items() if sum(rows)}
    assert len(kinds) > 1, "one kind of candidate has won everything: this test sees no choice"
    before = logits(tuned, layout)
    plain = settle(tuned)
    assert not [method for method in plain if isinstance(method, Auto)]
    assert {method.name for method in plain} == kinds
    torch.testing.assert_close(logits(tuned, layout), before, atol=2e-5, rtol=1e-5)
    # the list as a run file states it, on another model
    again = attach(toy(layout), methods_from([method_record(method) for method in plain]), seed=9)
    assert again.counts() == tuned.counts()
    again.load_delta_state(state_of(tuned))
    assert torch.equal(logits(again, layout), logits(tuned, layout))
    native.save(tuned, tmp_path / "delta")
    assert torch.equal(logits(native.load(toy(layout), tmp_path / "delta"), layout), logits(tuned, layout))
    assert settle(tuned) == ()


def test_the_parts_with_the_best_score_per_number_stay() -> None:
    """By a loop over every number, with the averages of importance by the book."""
    tuned = attach(toy("llama"), [auto()], seed=1)
    optimizer = torch.optim.SGD(tuned.delta_parameters().values(), lr=0.1)
    (controller,) = tuned.controllers(StepPlan(4))  # one decision, after step 3
    owners = parts(tuned)
    smooth: dict[int, torch.Tensor] = {}
    unsure: dict[int, torch.Tensor] = {}
    for step in (1, 2, 3):
        optimizer.zero_grad()
        tuned.train()(**toy_batch("llama")).loss.backward()
        optimizer.step()
        for part in owners.values() if step < 3 else ():
            for _, p, _ in part.tensors():
                now = (p * p.grad).abs().detach().double()
                smooth[id(p)] = 0.85 * smooth.get(id(p), torch.zeros_like(now)) + 0.15 * now
                gap = (now - smooth[id(p)]).abs()
                unsure[id(p)] = 0.85 * unsure.get(id(p), torch.zeros_like(now)) + 0.15 * gap
        if step < 3:
            controller.after_step(step)
    found = []
    for name, part in owners.items():
        for e in range(len(part.mask)):
            score = cost = 0.0
            for _, p, axis in part.tensors():
                own = smooth[id(p)] * unsure[id(p)]
                own = own if axis is None else own.movedim(axis, 0)[e]
                score, cost = score + float(own.sum()), cost + own.numel()
            found.append((score / cost, cost, name, e))
    expected, left = set(), BUDGET
    for _, cost, name, e in sorted(found, key=lambda each: -each[0]):
        if cost <= left:
            expected.add((name, e))
            left -= cost
    controller.after_step(3)
    assert {(name, e) for name, part in owners.items() for e in part.mask.nonzero().flatten().tolist()} == expected


@pytest.mark.parametrize("removed", [True, False])
def test_a_dropped_part_does_nothing_at_any_time(removed: bool) -> None:
    tuned, _ = trained(auto(end=0.0), remove=False)  # ends right after the last decision
    whole = attach(toy("llama"), [auto()], seed=1)
    (controller,) = whole.controllers(StepPlan(10))
    perturb(whole)
    for index, part in enumerate(parts(whole).values()):
        part.mask.copy_((torch.arange(len(part.mask)) + index) % 3 == 0)
    controller.step = 1
    controller._silence()
    with torch.no_grad():  # what a dropped part holds besides does not matter
        for part in parts(whole).values():
            for name, p, axis in part.tensors():
                if name != part.components.zero and axis is not None:
                    p.movedim(axis, 0)[~part.mask] = 7.0
    before = logits(whole, "llama")
    if removed:
        controller.finish()
    else:
        settle(whole)
    torch.testing.assert_close(logits(whole, "llama"), before, atol=2e-5, rtol=1e-5)
    assert tuned.counts()[0] <= BUDGET


def test_a_choice_that_is_not_settled_is_saved_as_one_or_says_what_to_do(tmp_path: Path) -> None:
    lora = {"method": "lora", "rank": 40, "targets": ["q", "v", "down"]}
    tuned, _ = trained(Auto(budget=5007, candidates=[lora, CANDIDATES[3]], start=0.1, end=0.4, every=1))
    assert 4096 < tuned.counts()[0] < 5007  # and above what a size in a file may be
    native.save(tuned, tmp_path / "delta")
    loaded = native.load(toy("llama"), tmp_path / "delta")
    assert torch.equal(logits(loaded, "llama"), logits(tuned, "llama")) and len(settle(loaded)) > 1
    tuned, _ = trained(auto(budget=60))
    with pytest.raises(RefusedError, match="settle"):
        native.save(tuned, tmp_path / "other")


def test_prompts_too() -> None:
    tuned, _ = trained(Auto(budget=70, candidates=list(ROWS), start=0.1, end=0.4, every=1))
    before, kept = logits(tuned, "llama"), tuned.counts()[0]
    assert "prompt" in {method.name for method in settle(tuned)} and 0 < kept <= 70
    torch.testing.assert_close(logits(tuned, "llama"), before, atol=2e-5, rtol=1e-5)


def test_it_merges_as_its_members_do() -> None:
    linear = Auto(budget=200, candidates=[CANDIDATES[0], CANDIDATES[4]])
    tuned = attach(toy("llama"), [linear])
    perturb(tuned)
    before = logits(tuned, "llama")
    tuned.merge()
    with pytest.raises(RefusedError, match="merged"):
        settle(tuned)
    torch.testing.assert_close(logits(tuned, "llama"), before, atol=2e-5, rtol=1e-5)
    tuned.unmerge()
    settle(tuned)
    tuned.merge()
    torch.testing.assert_close(logits(tuned, "llama"), before, atol=2e-5, rtol=1e-5)
    with pytest.raises(RefusedError, match="mlp"):
        attach(toy("llama"), [Auto(budget=200, candidates=[CANDIDATES[0], CANDIDATES[1]])]).merge()


def test_other_methods_and_lanes_stay_beside_it() -> None:
    tuned = attach(toy("llama"), [LoRA(rank=2), auto(), LoRA(rank=1)], "a")
    tuned.add("b", [LoRA(rank=3)])
    perturb(tuned, "a"), perturb(tuned, "b")
    answers = {}
    for lane in ("a", "b"):
        with tuned.use(lane):
            answers[lane] = logits(tuned, "llama")
    settle(tuned, "a")
    names = [part.method.name for part in tuned.attached("a")]
    assert tuned.name == "b" and len(names) > 4 and names[0] == names[-1] == "lora"
    for lane in ("a", "b"):
        with tuned.use(lane):
            torch.testing.assert_close(logits(tuned, "llama"), answers[lane], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("step", [2, 6, 9])
def test_resumed_before_between_and_after_decisions_it_ends_bit_for_bit_the_same(step: int, tmp_path: Path) -> None:
    settings = TrainSettings(max_steps=10, batch_size=6, learning_rate=1e-2, save_every=1, keep_checkpoints=99)
    method = Auto(budget=300, candidates=[record for record in CANDIDATES if record["method"] != "bitfit"], start=0.2, end=0.3,
                  every=2)
    whole, log = attach(small(), [method], seed=3), Log()
    run(whole, settings, log, folder=tmp_path)
    again, other = attach(small(), [method], seed=4), Log()
    run(again, settings, other, resume=read_checkpoint(tmp_path / f"step-{step}"))
    assert_same(state_of(again), state_of(whole))
    assert [e.ranks for e in other.of(RankChanged)] == [e.ranks for e in log.of(RankChanged) if e.step > step]
    assert not log.of(Warned) and whole.counts()[0] <= 300


def test_the_best_step_may_lie_before_the_removal() -> None:
    settings = TrainSettings(max_steps=8, batch_size=6, learning_rate=1e-2, eval_every=1, restore_best=True)
    tuned, log = attach(small(), [auto("gpt2", start=0.2, end=0.4)], seed=3), Log()
    count, seen = iter(range(1, 9)), {}

    def evaluate(tuned: Tuned) -> dict[str, float]:
        step = next(count)
        seen[step] = held_out_loss(tuned)["loss"]
        return {"loss": 0.0 if step == 2 else float(step)}

    run(tuned, settings, log, evaluate=evaluate)
    settle(tuned)
    assert held_out_loss(tuned.eval())["loss"] == pytest.approx(seen[2], rel=1e-5)
    assert [event.kind for event in log.of(Warned)] == ["budget"]


def test_without_candidates_those_stand_that_offer_themselves() -> None:
    method = Auto()
    names = [record["method"] for record in method.candidates]
    assert names == ["bitfit", "bottleneck", "lora", "prefix"] and Auto(candidates=method.candidates) == method
    tuned = attach(toy("llama"), [Auto(budget=100)])
    assert tuned.counts()[0] > 200
    assert attach(toy("llama"), [Auto(budget="1%")]).counts() == tuned.counts()
    narrow = attach(toy("llama"), [Auto(budget=100, layers="1")])
    assert {site.layer for site, _ in narrow.pairs()} == {1}


@pytest.mark.parametrize(("settings", "message"), [
    ({"budget": 0}, "at least one"), ({"budget": "0%"}, "share"), ({"budget": "150%"}, "share"),
    ({"budget": True}, "count"), ({"budget": "-5"}, "count"), ({"budget": "many"}, "count"),
    ({"start": 0.6, "end": 0.5}, "below 1"), ({"candidates": [{"method": "auto"}]}, "candidate of itself"),
    ({"candidates": [{"method": "lorra"}]}, "lora"), ({"candidates": [{"method": "lora", "rnk": 3}]}, "rank"),
])
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Auto(**settings)


@pytest.mark.parametrize(("settings", "error", "message"), [
    ({"budget": 7}, SettingsError, "too small to keep anything.*at least 16"),
    ({"budget": 10**6}, SettingsError, "nothing to choose.*less than"),
    ({"budget": "100%"}, SettingsError, r"100% of [\d,]+"),
    ({"candidates": [{"method": "ia3"}]}, RefusedError, "'ia3' has no components"),
    ({"candidates": [{"method": "bottleneck"}]}, RefusedError, "bias: false"),
    ({"candidates": [{"method": "lora", "init": "pissa"}]}, RefusedError, "PiSSA"),
    ({"candidates": [{"method": "prefix", "reparametrise": 4}]}, RefusedError, "hang together"),
    ({"candidates": [{"method": "prefix"}, {"method": "prefix", "length": 2}]}, RefusedError, "one candidate"),
    ({"candidates": [{"method": "lora", "targets": ["nowhere"]}]}, TargetError, "nowhere"),
])
def test_what_cannot_be_chosen_leaves_the_model_alone(settings: dict[str, object], error: type[Exception], message: str) -> None:
    model = toy("llama")
    before = logits(model, "llama")
    with pytest.raises(error, match=message):
        attach(model, [auto(**settings)])
    assert torch.equal(logits(model, "llama"), before)


def test_a_strategy_that_grows_has_another_budget() -> None:
    tuned = attach(toy("llama"), [auto()])
    with pytest.raises(SettingsError, match="grow: false"):
        tuned.controllers(StepPlan(100, on_demand=True))
    with pytest.raises(SettingsError, match="longer than the run"):
        tuned.controllers(StepPlan(1))
