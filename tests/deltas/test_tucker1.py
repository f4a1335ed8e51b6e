"""Tucker-1: one basis on the residual stream's side, private factors on the other, rows of the basis chosen layer by layer."""

import copy

import pytest
import torch
from torch import nn

from deltaloom.checkpoint import native
from deltaloom.checkpoint.convert import put_back, to_lora
from deltaloom.deltas.base import StepPlan, keep_rows, method_from, method_record
from deltaloom.deltas.tucker1 import WRITES, Tucker1
from deltaloom.errors import NonFiniteError, SettingsError
from deltaloom.events import Emitter, RankChanged
from deltaloom.train.warmup import warm_up
from deltaloom.tuned import attach, restore
from tests.contract.cases import assert_same_tensors, gradients, logits, perturb, state
from tests.deltas.dense_changes import assert_is
from tests.deltas.tensor_oracles import train
from tests.toys import LAYOUTS, toy, toy_batch

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
SCHEDULE = {"start": 0.2, "end": 0.3, "every": 2}


def tuned_of(layout="llama", shaken=True, dtype=torch.float32, **settings):
    tuned = attach(toy(layout), [Tucker1(**{"rank": 2, "basis": "random"} | settings)])
    if shaken:
        perturb(tuned, size=0.2)
    return tuned.to(dtype)


def bases(tuned):
    return {key: basis.rows for key, basis in tuned.attached()[0].attachment.shared.items()}


def loss_of(tuned, layout="llama"):
    return tuned(**toy_batch(layout)).loss


def matrix(scale):
    """The dumb way: one outer product of a private row and its row of the basis after the other."""
    def build(site, saved):
        writes = site.role in WRITES
        basis = saved[f"shared.{'out' if writes else 'in'}-{site.d_out if writes else site.d_in}:rows"]
        private, chosen = saved[f"{site.name}:private"], saved[f"{site.name}:chosen"]
        total = torch.zeros(site.d_out, site.d_in, dtype=torch.float64)
        for row, index in enumerate(chosen.tolist()):
            if saved[f"{site.name}:mask"][row]:
                pair = (basis[index], private[row]) if writes else (private[row], basis[index])
                total += scale * torch.outer(*pair)
        return total
    return build


# ---- the change --------------------------------------------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("shorter", [False, True])
def test_factors_and_outputs_are_those_of_outer_products(layout, shorter):
    tuned = tuned_of(layout, dtype=torch.float64, scale=0.75).eval()
    generator = torch.Generator().manual_seed(1)
    for _, delta in tuned.pairs():
        if shorter:
            delta.keep(torch.randperm(3, generator=generator)[:2].sort().values, keep_rows)
        delta.mask[1] = False
    assert_is(tuned, toy(layout).double(), layout, matrix(0.75))


def test_masked_rows_count_in_training():
    tuned = tuned_of()
    _, delta = tuned.pairs()[0]
    whole = delta.matrix()
    delta.mask[0] = False
    assert torch.equal(delta.train().matrix(), whole) and not torch.allclose(delta.eval().matrix(), whole)


def test_a_basis_is_counted_saved_and_trained_once():
    tuned = tuned_of(shaken=False)  # per block q, o 16 x 16, k, v 8 x 16, gate, up 24 x 16, down 16 x 24
    assert {key: tuple(rows.shape) for key, rows in bases(tuned).items()} == {"in-16": (3, 16), "out-16": (3, 16)}
    private = 2 * 3 * (16 + 8 + 8 + 24 + 24 + 16 + 24)
    assert tuned.counts() == (private + 2 * 3 * 16, 0)
    assert [key for key in tuned.delta_parameters() if "shared" in key] == ["0:shared.in-16:rows", "0:shared.out-16:rows"]
    assert all([key for key, _ in delta.named_parameters()] == ["private"] for _, delta in tuned.pairs())


@each_layout
def test_born_at_zero_private_factors_train_first_and_the_basis_from_the_second_step(layout):
    tuned = tuned_of(layout, shaken=False)
    assert torch.equal(logits(tuned, layout), logits(toy(layout), layout))
    assert all(delta.orthogonality() < 1e-6 for _, delta in tuned.pairs())
    loss_of(tuned, layout).backward()
    assert all(gradient.any() != ("shared" in key) for key, gradient in gradients(tuned).items())
    optimizer = torch.optim.SGD(tuned.delta_parameters().values(), lr=0.1)
    optimizer.step()
    optimizer.zero_grad()
    loss_of(tuned, layout).backward()
    found = gradients(tuned)
    assert found.keys() == tuned.delta_parameters().keys() and all(gradient.any() for gradient in found.values())


def test_both_streams_of_an_encoder_decoder_of_one_width_share_the_bases():
    tuned = tuned_of("t5", shaken=False)
    assert list(bases(tuned)) == ["in-16", "out-16"]
    assert {site.stack for site, _ in tuned.pairs()} == {"encoder.block", "decoder.block"}
    wide = attach(toy("gpt2"), [Tucker1(rank=2, targets="all")])
    assert set(bases(wide)) == {"in-16", "out-16"}


# ---- where the bases start -----------------------------------------------------------------------------------------------


def subspace(layout, batches, size):
    """Projectors on the main left singular vectors of the untouched weights' normalised gradients, side by side."""
    model = toy(layout)
    for batch in batches:
        model(**batch).loss.backward()
    stacked = {}
    for site, _ in tuned_of(layout).pairs():
        gradient = model.get_submodule(site.path).weight.grad.double()
        gradient = gradient.T if gradient.shape != (site.d_out, site.d_in) or layout == "gpt2" else gradient
        gradient = gradient / gradient.norm()
        writes = site.role in WRITES
        stacked.setdefault("out-16" if writes else "in-16", []).append(gradient if writes else gradient.T)
    found = {}
    for key, each in stacked.items():
        u, s, _ = torch.linalg.svd(torch.cat(each, 1))
        assert s[size - 1] > 1.02 * s[size]
        found[key] = u[:, :size] @ u[:, :size].T
    return found


@pytest.mark.parametrize("layout", ["bert", "llama", "t5"])
def test_a_gradient_basis_spans_the_main_directions_of_all_layers_gradients(layout):
    """Exactly where layers are narrow on their private side: at most the rows of the basis and 16 more."""
    size = 8
    tuned = attach(toy(layout), [Tucker1(rank=2, size=size, basis="gradient", warm_up_batches=2)])
    batches = [toy_batch(layout, seed=seed) for seed in (1, 2, 3)]
    expected = subspace(layout, batches[:2], size)
    random = {key: rows.detach().clone() for key, rows in bases(tuned).items()}
    assert warm_up(tuned, batches, lambda batch: tuned(**batch).loss, Emitter()) == 2
    for key, rows in bases(tuned).items():
        rows = rows.detach().double()
        torch.testing.assert_close(rows @ rows.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-5)
        torch.testing.assert_close(rows.T @ rows, expected[key], rtol=0, atol=2e-3)
        assert not torch.allclose(rows.T @ rows, (random[key].T @ random[key]).double(), atol=0.1)
    assert torch.equal(logits(tuned, layout), logits(toy(layout), layout))


def test_sketched_gradients_give_nearly_the_same_energy_as_exact_ones():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(96, 96) for _ in range(3)))
    x = torch.randn(64, 96) * 2.0 ** -torch.arange(96)
    model(x).square().sum().backward()
    stacked = torch.cat([(layer.weight.grad / layer.weight.grad.norm()).T for layer in model], 1)
    best = torch.linalg.svdvals(stacked)[:4].square().sum()
    tuned = attach(model, [Tucker1(rank=4, size=4, targets="all", basis="gradient", warm_up_batches=1)])
    warm_up(tuned, [x], lambda each: tuned(each).square().sum(), Emitter())
    rows, = bases(tuned).values()
    assert float((rows.detach() @ stacked).square().sum()) > 0.95 * float(best)


def test_gradients_that_are_not_finite_are_refused():
    tuned = attach(nn.Sequential(nn.Linear(5, 5)), [Tucker1(rank=1, targets="all", basis="gradient")])
    with pytest.raises(NonFiniteError, match="warm-up"):
        warm_up(tuned, [torch.full((1, 5), float("nan"))], lambda x: tuned(x).sum(), Emitter())


def test_random_bases_and_loaded_ones_need_no_gradients():
    assert tuned_of().warm_ups() == []
    assert len(attach(toy("bert"), [Tucker1(rank=1, basis="gradient")]).warm_ups()) == 1


# ---- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["budget", "capped"])
def test_rows_are_kept_layer_by_layer_within_the_budget(rule):
    tuned = tuned_of(shaken=False, rank=1.5, reserve=2, rule=rule, **SCHEDULE)
    sides = [delta.private.shape[1] for _, delta in tuned.pairs()]
    log, sizes = [], []
    losses = train(tuned, lambda: loss_of(tuned), 20, log=log, each=lambda step: sizes.append(
        sum(delta.private.numel() for _, delta in tuned.pairs())))
    assert losses[-1] < losses[0]
    assert sizes[:13] == [3 * sum(sides)] * 13
    assert 1.5 * sum(sides) - max(sides) < sizes[-1] <= 1.5 * sum(sides) and set(sizes[13:]) == {sizes[-1]}
    ranks = [len(delta.private) for _, delta in tuned.pairs()]
    assert len(set(ranks)) > 1
    for _, delta in tuned.pairs():
        assert len(delta.chosen) == len(delta.mask) == len(delta.private)
        assert delta.chosen.tolist() == sorted(set(delta.chosen.tolist()))
    last = [event for event in log if isinstance(event, RankChanged)][-1]
    assert last.rows == "layer" and last.parameters == sizes[-1]
    assert {key: sum(each) for key, each in last.ranks.items()} == {
        f"{role} {shape}": sum(len(delta.private) for site, delta in tuned.pairs() if site.role == role)
        for role, shape in (("q", "16x16"), ("k", "8x16"), ("v", "8x16"), ("o", "16x16"), ("gate", "24x16"), ("up", "24x16"),
                            ("down", "16x24"))}
    assert all(tuple(rows.shape) == (3, 16) for rows in bases(tuned).values())


@each_layout
def test_removing_rows_saving_and_loading_several_times_changes_no_output(layout, tmp_path):
    tuned = tuned_of(layout, rule="effective", **SCHEDULE)
    sizes = []
    for number in range(3):
        train(tuned, lambda tuned=tuned: loss_of(tuned, layout), 12)
        apart = logits(tuned, layout)
        sizes.append(sum(len(delta.private) for _, delta in tuned.pairs()))
        native.save(tuned, tmp_path / f"{number}")
        loaded = native.load(toy(layout), tmp_path / f"{number}")
        assert_same_tensors(state(loaded), state(tuned))
        assert torch.equal(logits(loaded, layout), apart)
        converted = to_lora(tuned)
        assert converted.relative_error == 0
        tuned.merge()
        torch.testing.assert_close(logits(tuned, layout), apart, rtol=1e-4, atol=1e-4)
        tuned.unmerge()
        torch.testing.assert_close(logits(put_back(tuned.detach(), converted), layout), apart, rtol=1e-4, atol=1e-4)
        tuned = loaded
    assert sizes[0] > sizes[2] > 0


def test_silenced_rows_are_removed_without_a_change():
    tuned = tuned_of().eval()
    for _, delta in tuned.pairs():
        delta.mask[1] = False
    before = logits(tuned, "llama")
    for _, delta in tuned.pairs():
        delta.keep(delta.mask.nonzero().squeeze(1), keep_rows)
    torch.testing.assert_close(logits(tuned, "llama"), before, rtol=1e-5, atol=1e-5)
    delta.keep(torch.tensor([], dtype=torch.long), keep_rows)
    assert not delta.matrix().any() and to_lora(tuned).relative_error == 0


def test_bases_are_pulled_towards_orthonormal_rows_and_gradients_do_not_know():
    results = []
    for strength in (0.0, 0.4):
        tuned, seen = tuned_of(rule="fixed", orthogonality=strength), []
        before = tuned.pairs()[0][1].orthogonality()
        train(tuned, lambda tuned=tuned: loss_of(tuned), 10, lr=1e-4,
              each=lambda _, tuned=tuned, seen=seen: seen.append(gradients(tuned)))
        assert not tuned.penalty().requires_grad
        after = max(delta.orthogonality() for _, delta in tuned.pairs())
        assert after < 0.02 if strength else after > 0.5 * before
        results.append(seen[0])
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


# ---- elsewhere ---------------------------------------------------------------------------------------------------------


@each_layout
def test_a_copy_keeps_layers_and_bases_together(layout):
    tuned = tuned_of(layout)
    before = logits(tuned, layout)
    assert not torch.allclose(before, logits(toy(layout), layout))
    copied = copy.deepcopy(tuned)
    assert torch.equal(logits(copied, layout), before)
    with torch.no_grad():
        for rows in bases(copied).values():
            rows.zero_()
    assert torch.equal(logits(copied, layout), logits(toy(layout), layout))
    assert torch.equal(logits(tuned, layout), before)


def test_an_earlier_state_with_more_rows_is_taken_back():
    tuned = tuned_of(**SCHEDULE)
    before, answers = state(tuned), logits(tuned, "llama")
    train(tuned, lambda: loss_of(tuned), 20)
    assert any(tensor.shape != before[key].shape for key, tensor in state(tuned).items())
    tuned.load_delta_state(before)
    assert_same_tensors(state(tuned), before)
    assert torch.equal(logits(tuned, "llama"), answers)
    assert torch.equal(logits(restore(toy("llama"), tuned.saved()), "llama"), answers)
    train(tuned, lambda: loss_of(tuned), 20)
    train(tuned, lambda: loss_of(tuned), 20)  # a trained delta can be trained again


@pytest.mark.parametrize(("settings", "says"), [
    ({"size": 0}, "greater than or equal to 1"), ({"orthogonality": 1.0}, "less than 1"),
    ({"rule": "fixed", "rank": 1.5}, "rank 1.5"), ({"rule": "fixed", "rank": 2, "size": 3}, "size 3")])
def test_settings_that_are_refused(settings, says):
    with pytest.raises(SettingsError, match=says):
        Tucker1(**settings)


def test_sizes_and_ranks_that_cannot_be_are_refused():
    with pytest.raises(SettingsError, match=r"= 9|rank 2 x reserve[\s\S]*8 x 16"):
        attach(toy("llama"), [Tucker1(rank=2, size=9)])
    with pytest.raises(SettingsError, match=r"more than the basis has rows.*rank 5.*at most 4"):
        attach(toy("llama"), [Tucker1(rank=5, size=4)])
    with pytest.raises(SettingsError, match=r"too small.*at least 24, which is one row"):
        attach(toy("llama"), [Tucker1(rank=0.05, size=2)]).controllers(StepPlan(20))
    fixed = attach(toy("llama"), [Tucker1(rank=2, rule="fixed")])
    assert {len(delta.private) for _, delta in fixed.pairs()} == {2}
    method = Tucker1(rank=2, size=4)
    assert method_from(method_record(method)) == method
