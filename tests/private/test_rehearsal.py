"""What the owner sees besides hidden states: labels leak through gradients, noise hides them; members show in an update."""

from dataclasses import replace

import pytest
import torch

from deltaloom.data.encode import Example
from deltaloom.deltas.prefix import Prefix
from deltaloom.errors import RefusedError
from deltaloom.jobs import leakage_rehearsed
from deltaloom.private.cut import split
from deltaloom.private.guards.gaussian import Gaussian
from deltaloom.private.leakage import measure_labels, measure_membership
from deltaloom.private.rehearsal import Halves, coin_limit, gradients_seen, rehearsed_round
from deltaloom.report.private import leakage_page
from deltaloom.tuned import attach
from tests.private.pieces import PREFIX, examples, head_of, settings_for, task_for, task_name, three_blocks


def halves_of(layout, head):
    front, back = split(three_blocks(layout), task_name(layout), 1, head=head)
    return Halves(attach(front.model, [PREFIX], heads=head_of(layout, front.model) if front.has_head else ()), front, back)


@pytest.mark.parametrize("layout, head, attack", [("llama", "owner", "label-logits"), ("gpt2", "owner", "label-logits"),
                                                  ("llama", "party", "label-matching"), ("bert", "owner", "label-logits")])
def test_labels_at_home_leak_through_the_gradients(layout, head, attack):
    halves = halves_of(layout, head)
    seen, labels = gradients_seen(halves, task_for(layout, halves.front.model), examples(layout))
    found = measure_labels(seen, labels)[attack]
    assert found["recovered"] == 1.0 > found["majority"] + 0.3
    assert all(parameter.grad is None for parameter in halves.tuned.delta_parameters().values())


@pytest.mark.parametrize("layout, head", [("llama", "owner"), ("llama", "party"), ("bert", "owner")])
def test_independent_noise_on_the_gradients_hides_labels(layout, head):
    halves = halves_of(layout, head)
    guard = Gaussian(norm=0.01, sigma=50.0, crossing="gradient")
    seen, labels = gradients_seen(halves, task_for(layout, halves.front.model), examples(layout, 60), [guard])
    assert float(seen.gradients.std()) == pytest.approx(50.0, rel=0.1)
    for name, found in measure_labels(seen, labels).items():
        assert found["recovered"] < found["majority"] + 0.15, name


def test_a_new_head_at_home_shows_classes_to_who_knows_one_sample_of_each():
    halves = halves_of("bert", "party")
    seen, labels = gradients_seen(halves, task_for("bert", halves.front.model), examples("bert", 30))
    assert seen.head is None and sorted(seen.known) == [0, 1, 2] and not seen.logits
    found = measure_labels(seen, labels)
    assert found["label-directions"]["recovered"] > found["label-directions"]["majority"] + 0.2
    assert set(found) == {"label-directions", "label-norms"}


def test_members_show_in_a_single_update_and_strangers_do_not():
    model = three_blocks("llama")
    tuned = attach(model, [Prefix(length=12, init="random")])
    start = {name: tensor.clone() for name, tensor in tuned.delta_state().items()}
    rows = examples("llama", 48, seed=3)
    groups = [rows[:12], rows[12:24], rows[24:36], rows[36:]]
    settings = settings_for(max_steps=40, batch_size=12, learning_rate=0.05)
    rehearsed = rehearsed_round(tuned, task_for("llama", model), groups[:3], settings)
    assert all(torch.equal(start[name], tensor) for name, tensor in tuned.delta_state().items())
    mean = {name: sum(values[name].double() for values in rehearsed.single) / 3 for name in rehearsed.before}
    assert all(torch.allclose(mean[name].float(), rehearsed.common[name]) for name in mean)
    limit, trained = coin_limit(12, 12), torch.arange(24) < 12
    found = measure_membership(rehearsed.updates(), [*groups[0], *groups[3]], trained)
    assert found["membership-loss"]["single"] > limit and "mean of 3" in found["membership-loss"]
    assert found["membership-loss"]["single"] > found["membership-loss"]["mean of 3"]
    strangers = measure_membership({"single": rehearsed.updates()["single"]}, [*groups[1], *groups[3]], trained)
    for attack in strangers.values():
        assert 1 - limit < attack["single"] < limit


@pytest.mark.parametrize("layout", ["llama", "bert"])
def test_the_losses_of_a_rehearsal_are_the_tasks_own(layout):
    model = three_blocks(layout)
    tuned, task, rows = attach(model, [PREFIX], heads=head_of(layout, model)), task_for(layout, model), examples(layout, 6)
    rehearsed = rehearsed_round(tuned, task, [rows[:3]], settings_for(max_steps=2))
    tuned.load_delta_state(rehearsed.single[0])
    total, count = task.loss(tuned, task.collate([rows[4]]))
    mean = total / count
    assert rehearsed.loss(rehearsed.single[0], rows[4]).item() == pytest.approx(mean.item(), rel=1e-6)
    values = {name: tensor.clone().requires_grad_() for name, tensor in rehearsed.single[0].items()}
    gradients = torch.autograd.grad(rehearsed.loss(values, rows[4]), list(values.values()))
    mean.backward()
    for (name, parameter), gradient in zip(tuned.delta_parameters().items(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, msg=name)


def test_the_limit_of_a_coin_is_that_of_many_coins():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(4000, 20, generator=generator)
    ours, others = scores[:, :8], scores[:, 8:]
    areas = (ours[:, :, None] > others[:, None, :]).float().mean((1, 2))
    assert float(areas.quantile(0.975)) == pytest.approx(coin_limit(8, 12), abs=0.02)


def test_what_cannot_be_rehearsed_is_said(monkeypatch):
    def gone(opened):
        raise RefusedError("the emulator was moved")

    said = []
    monkeypatch.setattr(leakage_rehearsed, "_stand_in", gone)
    found = leakage_rehearsed.rehearsed(None, [], rows=2, noise=(), say=said.append)
    assert found["labels"] == found["membership"] == [] and "moved" in found["not_rehearsed"] and "moved" in said[0]
    monkeypatch.setattr(leakage_rehearsed, "_stand_in", lambda opened: None)
    monkeypatch.setattr(leakage_rehearsed, "_labels", lambda *given: [])
    found = leakage_rehearsed.rehearsed(None, examples("llama", 15), rows=2, noise=(), say=said.append)
    assert "at least 16 rows" in found["not_rehearsed"]
    page = leakage_page("a", {"rows": 2, "public": 3, "table": [], "verdicts": [], **found})
    assert "at least 16 rows" in page


def test_a_planted_secret_is_learned_where_its_row_is():
    row = Example(0, [1, 5, 6, 7, 8, 9, 10, 11, 2], [-100, -100, -100, 7, 8, 9, 10, 11, 2], 9)
    planted, where = leakage_rehearsed._planted([row, replace(row, row=1)], seed=1)
    assert where == [0] and planted[1] == replace(row, row=1)
    changed = planted[0]
    assert [label for label in changed.labels if label != -100] == changed.input_ids[3:] and changed.input_ids != row.input_ids
    few = [Example(0, [1, 5, 2], 1, 3)]
    assert leakage_rehearsed._planted(few, seed=1) == (few, [])
