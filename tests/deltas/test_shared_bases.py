"""What holds for every method whose matrices share bases: the bases are one module, wherever the delta goes."""

import copy

import pytest
import torch

from deltaloom.checkpoint import native
from deltaloom.checkpoint.convert import put_back, to_lora
from deltaloom.deltas.fact_tk import FacTTK
from deltaloom.deltas.fact_tt import FacTTT
from deltaloom.deltas.lotr import LoTR
from deltaloom.errors import CheckpointError, RefusedError
from deltaloom.tuned import attach, restore
from tests.contract.cases import assert_same_tensors, gradients, logits, perturb, state, steps
from tests.toys import LAYOUTS, toy, toy_batch

METHODS = {"tt": FacTTT, "tk": FacTTK, "lotr": LoTR}
each_method = pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def made(layout, cls, **settings):
    tuned = attach(toy(layout), [cls(rank=4, **settings)])
    perturb(tuned, size=0.2)
    return tuned


def shared_of(tuned):
    return tuned.attached()[0].attachment.shared


@each_method
def test_bases_are_registered_and_saved_once(cls):
    tuned = made("llama", cls)
    for site, delta in tuned.pairs():
        assert len(list(delta.parameters())) == 1 and not list(delta.children()), site.name
        assert {key for key, _ in delta.named_buffers()} == {"scale"}
    names = [key for key, parameter in tuned.named_parameters(remove_duplicate=False) if parameter.requires_grad]
    assert len(names) == len(tuned.delta_parameters()) == len(tuned.delta_state())
    assert sum(tensor.numel() for tensor in tuned.delta_state().values()) == tuned.counts()[0]
    assert all("." not in key and ":" not in key for key in shared_of(tuned))


@each_method
def test_a_base_gets_the_sum_of_its_sites_gradients(cls):
    tuned = made("llama", cls)
    tuned(**toy_batch("llama")).loss.backward()
    whole = gradients(tuned)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in whole.values())
    parts: dict[str, torch.Tensor] = {}
    for site, _ in tuned.pairs():  # all but one site stand still
        alone = made("llama", cls)
        for other, delta in alone.pairs():
            if other != site:
                down, scale, up = (factor.detach() for factor in delta.factors())
                delta.factors = lambda found=(down, scale, up): found
        alone(**toy_batch("llama")).loss.backward()
        for key, gradient in gradients(alone).items():
            parts[key] = parts.get(key, 0) + gradient
    for key, gradient in whole.items():
        torch.testing.assert_close(gradient, parts[key], rtol=1e-4, atol=1e-6)


@each_method
@each_layout
def test_a_copy_keeps_deltas_and_bases_together(cls, layout):
    tuned = made(layout, cls)
    before = logits(tuned, layout)
    copied = copy.deepcopy(tuned)
    assert {id(p) for p in copied.parameters()}.isdisjoint({id(p) for p in tuned.parameters()})
    assert torch.equal(logits(copied, layout), before)
    with torch.no_grad():
        for bases in copied.shared.values():  # what moves in the copy's list of modules moves its deltas, and only these
            bases.up.mul_(2)
            bases.down.mul_(0.5)
        again = logits(copied, layout)
        torch.testing.assert_close(again, before, rtol=1e-4, atol=1e-4)
        for bases in shared_of(copied).values():
            bases.up.zero_()
    assert torch.equal(logits(copied, layout), logits(toy(layout), layout))
    assert torch.equal(logits(tuned, layout), before)
    steps(copied, toy_batch(layout), 1)
    assert torch.equal(logits(tuned, layout), before)


@each_method
@each_layout
def test_saved_and_loaded_bit_for_bit(cls, layout, tmp_path):
    tuned = made(layout, cls)
    native.save(tuned, tmp_path / "d")
    loaded = native.load(toy(layout), tmp_path / "d")
    assert_same_tensors(state(loaded), state(tuned))
    assert torch.equal(logits(loaded, layout), logits(tuned, layout))
    for one in (tuned, loaded):
        steps(one, toy_batch(layout), 2)
    assert_same_tensors(state(loaded), state(tuned))


@each_method
def test_chosen_layers_come_back_to_their_own_groups(cls):
    tuned = made("llama", cls, targets=("k", "v", "down"), layers=(1,))
    restored = restore(toy("llama"), tuned.saved())
    assert list(shared_of(restored)) == list(shared_of(tuned))
    assert [site for site, _ in restored.pairs()] == [site for site, _ in tuned.pairs()]
    assert torch.equal(logits(restored, "llama"), logits(tuned, "llama"))


@each_method
def test_deltas_keep_the_order_of_their_sites(cls):
    method = cls(rank=4)
    assert [site for site, _ in attach(toy("llama"), [method]).pairs()] == method.sites(toy("llama"))


@each_method
def test_a_state_without_the_bases_does_not_fit(cls):
    tuned = made("llama", cls)
    state = {key: tensor for key, tensor in tuned.delta_state().items() if ":shared." not in key}
    with pytest.raises(CheckpointError, match=r"shared\."):
        tuned.load_delta_state(state)


@each_method
@each_layout
def test_a_plain_low_rank_delta_computes_the_same(cls, layout):
    tuned = attach(toy(layout, dtype=torch.float64), [cls(rank=4)])
    perturb(tuned, size=0.2)
    before = logits(tuned, layout)
    assert (before - logits(toy(layout, dtype=torch.float64), layout)).abs().max() > 0.01
    converted = to_lora(tuned)
    assert converted.relative_error == 0
    assert {tensor.shape[0] for key, tensor in converted.saved.state.items() if key.endswith(":down")} == {4}
    torch.testing.assert_close(logits(put_back(tuned.detach(), converted), layout), before, rtol=0, atol=1e-10)


@each_method
def test_parts_of_a_fused_layer_and_the_whole_merge_exactly(cls):
    tuned = attach(toy("gpt2", dtype=torch.float64), [cls(rank=4, targets=("q", "v", "down"))])
    perturb(tuned, size=0.2)
    before = logits(tuned, "gpt2")
    tuned.merge()
    torch.testing.assert_close(logits(tuned, "gpt2"), before, rtol=0, atol=1e-10)


@each_method
def test_two_lanes_have_bases_of_their_own(cls):
    tuned = made("llama", cls)
    before = logits(tuned, "llama")
    tuned.add("second", [cls(rank=2)], seed=1)
    perturb(tuned, "second")
    with tuned.use("default"):
        assert torch.equal(logits(tuned, "llama"), before)
    tuned.remove("second")
    assert list(tuned.shared) == [f"default/0/{key}" for key in shared_of(tuned)]


@each_method
def test_dropout_changes_training_only_and_moves_with_the_seed(cls):
    tuned = made("llama", cls, dropout=0.5)
    batch = toy_batch("llama")
    with torch.no_grad():
        plain = made("llama", cls)(**batch).logits
        assert torch.equal(tuned(**batch).logits, plain)
        tuned.train()
        one, other = tuned(**batch).logits, tuned(**batch).logits
    assert not torch.equal(one, other) and not torch.equal(one, plain)


@each_method
def test_seeds_decide_initial_values(cls):
    first, same, other = (attach(toy("llama"), [cls()], seed=seed).delta_state() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@each_method
def test_a_rank_above_a_side_is_refused_and_changes_nothing(cls):
    model = toy("llama")
    with pytest.raises(RefusedError, match=r"rank 9[\s\S]*\(8, 16\)"):
        attach(model, [cls(rank=9)])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert attach(model, [cls(rank=9, targets=("q", "down"))]).counts()[0] > 0
