"""AdaLoRA against PEFT's own, step by step in float64, and what is different on purpose."""

from dataclasses import replace

import pytest
import torch

from deltaloom.deltas._adaptive import group_names
from deltaloom.deltas.adalora import AdaLoRA
from deltaloom.deltas.base import Attachment, StepPlan
from deltaloom.errors import SettingsError
from deltaloom.events import Emitter, RankChanged
from deltaloom.train.optimizer import row_keeper
from deltaloom.tuned import attach
from tests.deltas.adaptive_pieces import Both, kept, ranks
from tests.toys import toy, toy_batch


def batch(step):
    return toy_batch("bert", seed=step)


def step_both(both, controller, step):
    """One step of each, in PEFT's order; (our loss and penalty, their loss)."""
    ours, penalty = both.ours(**batch(step)).loss, both.ours.penalty()
    theirs = both.peft.base_model(**batch(step)).loss  # called from outside, PEFT would leave its penalty out
    (ours + penalty).backward()
    theirs.backward()
    losses = ours.item(), penalty.item(), theirs.item()
    for optimizer in both.optimizers:
        optimizer.step()
    controller.after_step(step)
    both.peft.base_model.update_and_allocate(step)
    return losses


def compare_scores(both, controller):
    allocator = both.peft.base_model.rankallocator
    places = iter(zip(controller.importance.smoothness, controller.importance.uncertainty, strict=True))
    for site in both.triplets():
        for key in ("core", "up", "down"):
            smooth, unsure = next(places)
            name = both.name(site, key)
            for own, other in ((smooth, allocator.exp_avg_ipt[name]), (unsure, allocator.exp_avg_unc[name])):
                torch.testing.assert_close(own, other.T if key == "up" else other, rtol=1e-11, atol=1e-17)


def compare_masks(both):
    for site, triplets in both.triplets().items():
        assert triplets.mask.tolist() == both.peft.peft_config["default"].rank_pattern[both.name(site, "core")]


def zero_grads(both):
    for optimizer in both.optimizers:
        optimizer.zero_grad()


def test_a_whole_schedule_is_that_of_peft():
    """Losses, penalty, gradients, averages, masks and parameters; up to the last decision with the penalty."""
    both = Both()
    seen = []
    (controller,) = both.ours.controllers(StepPlan(both.total, Emitter([seen.append])))
    for step in range(1, 21):
        scores = controller._scores()
        ours, penalty, theirs = step_both(both, controller, step)
        assert ours + penalty == pytest.approx(theirs, rel=1e-12)
        both.near(gradients=True)
        both.near()
        if step < 20:
            compare_scores(both, controller)
        if controller.decisions:
            compare_masks(both)
        zero_grads(both)
    assert torch.equal(controller.previous, scores)  # the last decision's are those of the step before
    changed = [event.step for event in seen if isinstance(event, RankChanged)]
    assert changed == [6, 9, 12, 15, 18, 20] and sum(kept(both.ours).values()) == 12
    assert len(set(kept(both.ours).values())) > 1


@pytest.mark.parametrize("remove", [False, True])
def test_without_the_penalty_both_agree_to_the_end(remove):
    both = Both(orthogonality=0.0)
    keeper = row_keeper(both.optimizers[0]) if remove else None
    (controller,) = both.ours.controllers(StepPlan(both.total, keep_rows=keeper))
    for step in range(1, both.total + 1):
        ours, _, theirs = step_both(both, controller, step)
        assert ours == pytest.approx(theirs, rel=1e-12)
        zero_grads(both)
    controller.finish()
    assert sum(ranks(both.ours).values()) == 12
    for site, triplets in both.triplets().items():
        stays = torch.tensor(both.peft.peft_config["default"].rank_pattern[both.name(site, "core")])
        other = {key: both.their_parameters[both.name(site, key)].detach() for key in both.SUFFIX}
        torch.testing.assert_close(triplets.core, other["core"][stays], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(triplets.down, other["down"][stays], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(triplets.up, other["up"].T[stays], rtol=1e-12, atol=1e-13)
    both.ours.eval(), both.peft.eval()
    with torch.no_grad():
        torch.testing.assert_close(both.ours(**batch(99)).logits, both.peft(**batch(99)).logits, rtol=1e-12, atol=1e-12)


def test_the_scale_is_theirs_with_its_small_number():
    method = AdaLoRA(rank=2.5, reserve=1.5, alpha=7)
    assert method.initial_rank() == 4 and method.scale() == 7 / (4 + 1e-5)
    tuned = attach(toy("llama"), [method])
    assert {float(delta.scale) for _, delta in tuned.pairs()} == {7 / (4 + 1e-5)}
    for _, delta in tuned.pairs():
        assert not delta.triplets.core.any() and 0.01 < delta.triplets.up.std().item() < 0.03


# ---- documented differences -------------------------------------------------------------------------------------------

def test_equal_scores_do_not_all_fall_as_they_do_in_peft():
    both = Both(start=0, every=1)
    (controller,) = both.ours.controllers(StepPlan(both.total))
    for tensor in (*both.ours.delta_parameters().values(), *both.their_parameters.values()):
        tensor.grad = torch.zeros_like(tensor)  # every score is zero
    controller.after_step(1)
    both.peft.base_model.update_and_allocate(1)
    assert sum(kept(both.ours).values()) > 12
    pattern = both.peft.peft_config["default"].rank_pattern
    assert not any(any(mask) for mask in pattern.values())


def test_the_penalty_is_apart_from_the_loss():
    both = Both()
    own, other = both.ours(**batch(1)).loss, both.peft.base_model(**batch(1)).loss
    penalty = both.ours.penalty().item()
    assert other.item() - own.item() == pytest.approx(penalty, rel=1e-12) and penalty > 0.1


@pytest.mark.parametrize("kind", ["norm", "squared"])
def test_the_penalty_is_the_mean_over_all_factors(kind):
    tuned = attach(toy("llama"), [AdaLoRA(rank=2, reserve=2, penalty=kind, orthogonality=0.3)]).double()
    found = []
    for _, delta in tuned.pairs():
        for matrix in (delta.triplets.up, delta.triplets.down):
            gap = torch.linalg.matrix_norm(matrix @ matrix.T - torch.eye(4, dtype=torch.float64))
            found.append(gap if kind == "norm" else gap**2)
    torch.testing.assert_close(tuned.penalty(), 0.3 * torch.stack(found).mean(), rtol=1e-12, atol=0)


def test_masked_components_do_nothing_outside_training():
    tuned = attach(toy("llama"), [AdaLoRA(rank=2, targets="q")])
    for _, delta in tuned.pairs():
        with torch.no_grad():
            delta.triplets.core.fill_(2.0)
            delta.triplets.mask.copy_(torch.tensor([True, False, True]))
        down, scale, up = delta.eval().factors()
        assert (scale != 0).tolist() == [True, False, True]
        torch.testing.assert_close(delta.matrix(), (up[:, [0, 2]] * scale[[0, 2]]) @ down[[0, 2]])
        assert (delta.train().factors()[1] != 0).all()


# ---- settings ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("settings", "word"), [
    ({"start": 0.6, "end": 0.4}, "below 1"), ({"start": 0.7, "end": 0.7}, "below 1"), ({"reserve": 0.9}, "reserve"),
    ({"rank": 0}, "rank"), ({"beta1": 1}, "beta1"), ({"every": 0}, "every"), ({"penalty": "both"}, "penalty"),
    ({"orthogonality": -1}, "orthogonality"), ({"start": -0.1}, "start"), ({"importance": "weight"}, "importance")])
def test_illegal_settings(settings, word):
    with pytest.raises(SettingsError, match=word):
        AdaLoRA(**settings)


def test_a_rank_above_a_layers_smaller_side_is_refused_with_the_layers():
    model = toy("llama")
    with pytest.raises(SettingsError, match="initial rank is more") as caught:
        attach(model, [AdaLoRA(rank=8, reserve=1.5)])
    message = str(caught.value)
    assert "k_proj (8 x 16)" in message and "q_proj" not in message and "rank 8 x reserve 1.5 = 12" in message
    assert all(parameter.requires_grad for parameter in model.parameters())
    attach(model, [AdaLoRA(rank=8, reserve=1.0)])


@pytest.mark.parametrize(("total", "settings"), [(1, {}), (10, {"every": 6}), (4, {"end": 0.75})])
def test_a_run_too_short_is_refused_when_its_controllers_are_made(total, settings):
    tuned = attach(toy("llama"), [AdaLoRA(rank=1, **settings)])
    with pytest.raises(SettingsError, match="longer than the run"):
        tuned.controllers(StepPlan(total))


@pytest.mark.parametrize(("rank", "sites", "expected"), [(0.29, 100, 29), (0.05, 14, 1), (2, 14, 28), (1.5, 3, 4)])
def test_the_final_budget_in_ranks(rank, sites, expected):
    method = AdaLoRA(rank=rank)
    (site, delta), *_ = attach(toy("llama"), [AdaLoRA(rank=4)]).pairs()
    controller = method.controller(Attachment({replace(site, path=str(index)): delta for index in range(sites)}), StepPlan(100))
    assert controller.policy.target == expected


def test_layers_of_one_role_in_one_block_are_shown_apart():
    """An encoder-decoder has three query layers of the same number."""
    tuned = attach(toy("t5"), [AdaLoRA(rank=1, targets=["q", "down"])])
    names = group_names([site for site, _ in tuned.pairs()])
    shown = [(name, site.layer) for site, name in names.items()]
    assert len(set(shown)) == len(shown)
    assert sorted({name for name in names.values() if name.startswith("q")}) == [
        "q 16x16 decoder.block layer.0.SelfAttention.q", "q 16x16 decoder.block layer.1.EncDecAttention.q",
        "q 16x16 encoder.block layer.0.SelfAttention.q"]
    plain = attach(toy("llama"), [AdaLoRA(rank=1, targets=["q", "k"])])
    assert set(group_names([site for site, _ in plain.pairs()]).values()) == {"q 16x16", "k 8x16"}
