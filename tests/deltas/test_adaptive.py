"""Ranks decided in our own loop: removal, growth, exact budgets, equal scores however a batch is cut, loud failures."""

import gc
import weakref

import pytest
import torch
from torch.nn import functional

from deltaloom.allocation import Schedule
from deltaloom.deltas._adaptive import Policy, RankController
from deltaloom.deltas.adalora import AdaLoRA, _pool
from deltaloom.deltas.base import StepPlan
from deltaloom.deltas.lora import LoRA
from deltaloom.errors import DeltaloomError, NonFiniteError
from deltaloom.events import Emitter, RankChanged, Warned
from deltaloom.train.optimizer import make_optimizer, row_keeper
from deltaloom.train.settings import EarlyStop, TrainSettings
from deltaloom.tuned import attach
from tests.deltas.adaptive_pieces import Watched, kept, ranks
from tests.toys import toy, toy_batch
from tests.train.pieces import LanguageTask, Log, assert_same, feed, run, small, state_of

SETTINGS = TrainSettings(max_steps=12, batch_size=6, learning_rate=1e-2)
SCHEDULE = {"rank": 1, "reserve": 3, "start": 0.1, "end": 0.4, "every": 2}  # decisions after steps 2, 4, 6 and, the last, 8


def adaptive(*others, model=None, dtype=None, **settings):
    tuned = attach(model or small(dropout=0.0), [AdaLoRA(**(SCHEDULE | settings)), *others], seed=3)
    return tuned.to(dtype) if dtype else tuned


def own_loop(tuned, *, steps=12, remove, hold=False, each=lambda step: None):
    """A loop as a user writes it, with AdamW."""
    optimizer = make_optimizer(tuned.delta_parameters(), SETTINGS)
    (controller,) = tuned.controllers(StepPlan(12, keep_rows=row_keeper(optimizer) if remove else None))
    tuned.train()
    held = []
    for step in range(1, steps + 1):
        loss = tuned(**toy_batch("gpt2", seed=step)).loss + tuned.penalty()
        loss.backward()
        optimizer.step()
        controller.after_step(step)
        each(step)
        optimizer.zero_grad()
        if hold:
            held.append(loss)
    return controller, optimizer


@torch.no_grad()
def outputs(tuned):
    return tuned(**toy_batch("gpt2", labels=False)).logits


@pytest.mark.parametrize("training", [False, True])
def test_the_step_that_removes_changes_no_output(training):
    pair = [adaptive(model=toy("gpt2"), dtype=torch.float64) for _ in range(2)]
    for tuned, remove in zip(pair, (True, False), strict=True):
        own_loop(tuned, steps=8, remove=remove)
        tuned.train(training)
    torch.testing.assert_close(outputs(pair[0]), outputs(pair[1]), rtol=1e-12, atol=1e-13)
    assert sum(ranks(pair[0]).values()) == 8 and set(ranks(pair[1]).values()) == {3}
    assert kept(pair[0]) == kept(pair[1]) == ranks(pair[0])


def test_with_moments_gathered_it_goes_on_like_a_run_that_only_masks():
    pair = [adaptive(model=toy("gpt2"), dtype=torch.float64, orthogonality=0.0) for _ in range(2)]
    seen = [[], []]
    for tuned, found, remove in zip(pair, seen, (True, False), strict=True):
        controller, optimizer = own_loop(tuned, remove=remove, each=lambda step, t=tuned, f=found: f.append(outputs(t)))
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
            id(p) for p in tuned.delta_parameters().values()} == {id(p) for p in optimizer.state}
        controller.finish()
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    assert ranks(pair[0]) == ranks(pair[1])
    for key, tensor in pair[0].delta_state().items():
        torch.testing.assert_close(tensor, pair[1].delta_state()[key], rtol=1e-10, atol=1e-12)


def test_moments_are_those_of_the_rows_that_stay():
    tuned, before = adaptive(), {}
    optimizer = make_optimizer(tuned.delta_parameters(), SETTINGS)
    (controller,) = tuned.controllers(StepPlan(12, keep_rows=row_keeper(optimizer)))
    tuned.train()
    for step in range(1, 9):
        tuned(**toy_batch("gpt2", seed=step)).loss.backward()
        optimizer.step()
        if step == 8:
            before = {key: optimizer.state[p]["exp_avg_sq"].clone() for key, p in tuned.delta_parameters().items()}
            old = {key: p.detach().clone() for key, p in tuned.delta_parameters().items()}
        controller.after_step(step)
        if step < 8:
            optimizer.zero_grad()
    sizes = set()
    for key, parameter in tuned.delta_parameters().items():
        rows = [index for index, row in enumerate(old[key]) if any(torch.equal(row, now) for now in parameter)]
        assert len(parameter) == len(rows) or key.endswith("core")
        sizes.add(len(parameter))
        if not key.endswith("core"):
            assert torch.equal(optimizer.state[parameter]["exp_avg_sq"], before[key][rows])
        assert parameter.grad.shape == parameter.shape == optimizer.state[parameter]["exp_avg"].shape
    assert len(sizes) > 1


def test_an_earlier_loss_that_is_held_does_not_break_what_comes():
    tuned = adaptive(dtype=torch.float64, model=toy("gpt2"))
    own_loop(tuned, remove=True, hold=True)
    assert sum(ranks(tuned).values()) == 8


def test_what_is_removed_is_not_kept_in_memory():
    tuned = adaptive()
    old = [weakref.ref(parameter) for parameter in tuned.delta_parameters().values()]
    counts = []

    class Task(LanguageTask):
        def loss(self, tuned, batch):
            if len(counts) in (0, 22):
                gc.collect()
            counts.append(sum(ref() is not None for ref in old))
            return super().loss(tuned, batch)

    run(tuned, SETTINGS, task=Task(), feed=feed(SETTINGS, micro_tokens=60))
    replaced = sum(3 for rank in ranks(tuned).values() if rank < 3)
    assert counts[0] == len(old) and counts[-1] == len(old) - replaced and replaced > 3


def test_without_a_way_to_remove_masks_stay_until_the_end():
    tuned = adaptive(model=toy("gpt2"))
    controller, _ = own_loop(tuned, remove=False)
    assert set(ranks(tuned).values()) == {3} and sum(kept(tuned).values()) == 8
    for _, delta in tuned.pairs():
        assert not delta.triplets.core[~delta.triplets.mask].any()
    tuned.eval()
    before = outputs(tuned)
    controller.finish()
    torch.testing.assert_close(outputs(tuned), before)
    assert ranks(tuned) == kept(tuned) and sum(ranks(tuned).values()) == 8


@pytest.mark.parametrize(("rank", "total"), [(1, 8), (0.5, 4), (0.05, 1), (1.5, 12), (3, 24)])
def test_the_budget_is_met_exactly_and_events_tell_it(rank, total):
    tuned, log = adaptive(rank=rank, reserve=max(1.0, 3 / rank)), Log()
    run(tuned, SETTINGS, log)
    assert sum(ranks(tuned).values()) == total
    changes = log.of(RankChanged)
    assert [event.step for event in changes] == [2, 4, 6, 8]
    for event in changes:
        assert event.rows == "layer" and event.parameters > 0 and event.budget > 0 and event.residual > 0
        allowed = Schedule.of_run(12, 0.1, 0.4, 2).budget(event.step, 24, total)
        assert sum(map(sum, event.ranks.values())) == int(allowed + 1e-9)
        assert {name: len(rows) for name, rows in event.ranks.items()} == {
            "qkv 48x16": 2, "o 16x16": 2, "up 64x16": 2, "down 16x64": 2}
    sums = [sum(map(sum, event.ranks.values())) for event in changes]
    assert sums == sorted(sums, reverse=True) and sums[-1] == total
    assert not [event for event in log.of(Warned) if event.kind == "budget"]
    assert sum(p.numel() for p in tuned.delta_parameters().values()) == changes[-1].parameters


def test_a_component_can_come_back():
    """Masked when its gradients are small, kept at the next decision, when they are the largest."""
    tuned = attach(toy("llama"), [AdaLoRA(rank=1, reserve=2, start=0, end=0.1, every=2, targets="q", importance="gradient")])
    (controller,) = tuned.controllers(StepPlan(10))
    triplets = [delta.triplets for _, delta in tuned.pairs()]
    masks = []
    for step in range(1, 10):
        for index, each in enumerate(triplets):
            for parameter in (each.core, each.up, each.down):
                size = torch.tensor([[1.0], [5.0 if index else 2.0]])
                size[0] = 0.5 if step < 3 and not index else 100.0 * step if not index else 1.0
                parameter.grad = torch.ones_like(parameter) * size * (1 + step % 2)
        with torch.no_grad():
            triplets[0].core.fill_(0.5)
        controller.after_step(step)
        if controller.policy.schedule.due(step):
            masks.append(triplets[0].mask.tolist())
            assert triplets[0].core[~triplets[0].mask].abs().sum() == 0
    assert masks[0] == [False, True] and masks[1][0] and masks[-1][0]


def test_continuing_with_fewer_components_than_the_budget_keeps_them():
    tuned = adaptive()
    run(tuned, SETTINGS)
    with torch.no_grad():
        first = next(delta for _, delta in tuned.pairs() if len(delta.triplets.core))
        first.triplets.mask[0] = False
    (controller,) = tuned.controllers(StepPlan(12))
    controller.step = 1
    controller.finish()
    assert sum(ranks(tuned).values()) == 7
    log = Log()
    run(tuned, SETTINGS, log)
    assert sum(ranks(tuned).values()) == 7 and not log.of(Warned)


def test_one_batch_or_eight_parts_of_it_give_the_same_scores():
    found = []
    for micro in (10_000, 1):
        tuned = adaptive(dtype=torch.float64)
        watched = Watched(tuned)
        settings = TrainSettings(max_steps=12, batch_size=8, learning_rate=1e-2, early_stop=None)
        states = []

        class Task(LanguageTask):
            def loss(self, tuned, batch, watched=watched, states=states):
                if watched.made and watched.controller.decisions < 2:
                    states.append((watched.controller.step, watched.controller._scores()))
                labels = batch.labels[:, 1:]
                logits = tuned(**batch.inputs).logits[:, :-1].flatten(0, 1)  # not cast to float32
                loss = functional.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=-100)
                return loss, (labels != -100).sum()

        run(tuned, settings, task=Task(), feed=feed(settings, micro_tokens=micro))
        found.append((dict(states), ranks(tuned), len(states)))
    assert found[1][2] > 3 * found[0][2]
    assert found[0][0].keys() == found[1][0].keys() and max(found[0][0]) == 3
    for step, scores in found[0][0].items():
        torch.testing.assert_close(found[1][0][step], scores, rtol=1e-9, atol=1e-20)
    assert found[0][1] == found[1][1]


def test_the_same_run_twice_is_the_same_bit_for_bit():
    runs = []
    for _ in range(2):
        tuned, log = adaptive(LoRA(rank=2, targets="q"), dropout=0.1, model=small()), Log()
        run(tuned, SETTINGS, log)
        runs.append((state_of(tuned), [(event.ranks, event.importance) for event in log.of(RankChanged)]))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_a_gradient_that_is_no_number_reaches_no_average():
    tuned = adaptive()
    watched, before = Watched(tuned), {}

    class Task(LanguageTask):
        def loss(self, tuned, batch):
            loss, count = super().loss(tuned, batch)
            controller = watched.controller
            if controller.step == 4:
                before.update(step=[t.clone() for t in (*controller.importance.smoothness, *controller.importance.uncertainty)],
                              masks=[delta.triplets.mask.clone() for _, delta in tuned.pairs()])
                loss = loss * torch.nan
            return loss, count

    with pytest.raises(NonFiniteError, match="step 5"):
        run(tuned, SETTINGS, task=Task())
    controller = watched.controller
    assert controller.step == 4
    after = [*controller.importance.smoothness, *controller.importance.uncertainty]
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(after, before["step"], strict=True))
    assert all(torch.equal(delta.triplets.mask, mask) for (_, delta), mask in zip(tuned.pairs(), before["masks"], strict=True))


@pytest.mark.parametrize("every", [1, 2])
def test_an_end_before_the_last_decision_is_a_warning(every):
    tuned, log = adaptive(), Log()
    settings = TrainSettings(max_steps=12, batch_size=6, learning_rate=1e-2, eval_every=every, early_stop=EarlyStop(patience=1))
    values = iter([1.0, 2.0])
    result = run(tuned, settings, log, evaluate=lambda tuned: {"loss": next(values)})
    assert (result.reason, result.step) == ("early_stop", 2 * every)
    (warned,) = [event for event in log.of(Warned) if event.kind == "budget"]
    kept_now = sum(ranks(tuned).values())
    assert f"{kept_now} instead of 8" in warned.message and ranks(tuned) == kept(tuned)
    assert kept_now == int(Schedule.of_run(12, 0.1, 0.4, 2).budget(2 * every, 24, 8))


def test_a_controller_that_nobody_calls_is_an_error():
    """peft#432, #1327, #1801: ranks stayed as they were, and nothing said so."""
    tuned = adaptive()
    (controller,) = tuned.controllers(StepPlan(12, Emitter()))
    with pytest.raises(DeltaloomError, match=r"never decided.*after_step"):
        controller.finish()


def test_one_component_stays_without_a_warning_where_none_is_paid_for():
    tuned, log = adaptive(), Log()
    pools = [_pool(site, "group", delta.triplets) for site, delta in tuned.pairs()]
    policy = Policy("budget", "gradient", 0.85, 0.85, Schedule.of_run(4, 0.0, 0.25, 1), 0.3, "layer")
    controller = RankController(pools, policy, StepPlan(4, log.emit))
    for step in range(1, 5):
        controller.after_step(step)
    controller.finish()
    assert sum(ranks(tuned).values()) == 1 and not log.of(Warned)


def test_a_controller_without_a_policy_only_keeps_vectors_orthonormal():
    tuned = adaptive()
    (site, delta), *_ = tuned.pairs()
    controller = RankController([_pool(site, "group", delta.triplets)], None, StepPlan(4), orthonormal=0.5)
    before = delta.triplets.residual()
    for step in range(1, 60):
        controller.after_step(step)
    controller.finish()
    assert before > 0.9 and delta.triplets.residual() < 1e-3 and len(delta.triplets.core) == 3
