"""Deltas that add to a layer's own tensors, against models whose parameters were changed by hand."""

import copy

import pytest
import torch
from transformers import BeitConfig, BeitForImageClassification

from deltaloom.checkpoint import native
from deltaloom.checkpoint.convert import combine, to_lora
from deltaloom.checkpoint.facts import site_facts
from deltaloom.deltas import base
from deltaloom.deltas.base import AttachContext, Attachment, Delta
from deltaloom.deltas.full import Full
from deltaloom.deltas.lora import LoRA
from deltaloom.errors import RefusedError
from deltaloom.tuned import Tuned, attach, restore
from tests.stacks import EXPERTS, STACKED, TURNED, LowRankStack, LowRankStackDelta, stacked, stacked_batch
from tests.toys import toy, toy_batch

CHECKPOINTING = ("mixtral", "qwen3-moe", "gpt-oss")


def shaken(tuned, name=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.delta_parameters(name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return tuned


def logits(model, layout, dtype=torch.float32):
    with torch.no_grad():
        return model(**stacked_batch(layout, dtype)).logits


def changed_by_hand(layout, pairs, dtype=torch.float32):
    """A model with the sum of the low-rank products put into its parameters, slice by slice, in float64."""
    model = stacked(layout, dtype)
    with torch.no_grad():
        for name in dict.fromkeys(site.name for site, _ in pairs):
            parameter = model.get_parameter(name)
            total = parameter.double()
            for site, delta in pairs:
                if site.name == name:
                    dense = torch.stack([up.double() @ down.double() for up, down in zip(delta.up, delta.down, strict=True)])
                    total = total + (dense.transpose(1, 2) if layout in TURNED else dense).reshape(parameter.shape)
            parameter.copy_(total)
    return model


@pytest.mark.parametrize("layout", STACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_changes_at_birth_and_only_deltas_train(layout, dtype):
    model = stacked(layout, dtype)
    bare = logits(model, layout, dtype)
    tuned = attach(model, [LowRankStack()])
    assert torch.equal(logits(tuned, layout, dtype), bare)
    tuned(**stacked_batch(layout, dtype)).loss.backward()
    assert {name for name, parameter in tuned.named_parameters() if parameter.requires_grad} \
        == {name for name, parameter in tuned.named_parameters() if parameter.grad is not None}
    assert all(p.grad.isfinite().all() and p.dtype == torch.float32 for p in tuned.delta_parameters().values())
    assert tuned.never_ran() == []


@pytest.mark.parametrize("layout", STACKED)
def test_outputs_and_gradients_are_those_of_changed_parameters(layout):
    tuned = shaken(attach(stacked(layout), [LowRankStack()]))
    hand = changed_by_hand(layout, tuned.pairs())
    assert (logits(hand, layout) - logits(stacked(layout), layout)).abs().max() > 1e-3
    torch.testing.assert_close(logits(tuned, layout), logits(hand, layout), rtol=1e-4, atol=1e-5)
    tuned(**stacked_batch(layout)).loss.backward()
    hand(**stacked_batch(layout)).loss.backward()
    for site, delta in tuned.pairs():
        dense = hand.get_parameter(site.name).grad
        shape = (site.slices, site.d_in, site.d_out) if layout in TURNED else (site.slices, site.d_out, site.d_in)
        for index, gradient in enumerate(dense.reshape(shape)):
            gradient = gradient.T if layout in TURNED else gradient
            torch.testing.assert_close(delta.up.grad[index], gradient @ delta.down[index].T, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(delta.down.grad[index], delta.up[index].T @ gradient, rtol=1e-3, atol=1e-5)
    assert any(delta.down.grad.abs().max() > 1e-4 for _, delta in tuned.pairs())


def test_a_bf16_base_gets_the_sum_rounded_once():
    tuned = shaken(attach(stacked("mixtral", torch.bfloat16), [LowRankStack()]))
    hand = changed_by_hand("mixtral", tuned.pairs(), torch.bfloat16)
    torch.testing.assert_close(logits(tuned, "mixtral"), logits(hand, "mixtral"), rtol=1e-2, atol=1e-2)
    site, delta = tuned.pairs()[0]
    wrapper = tuned.model.get_submodule(site.path)
    stood_in = wrapper._replaced([(site, delta)])[site.tensor]
    exact = wrapper.base.get_parameter(site.tensor).double() + (delta.up.double() @ delta.down.double())
    assert stood_in.dtype == torch.bfloat16
    assert ((stood_in.double() - exact).abs() <= exact.abs() * 2 ** -8).all()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("layout", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_every_way_of_running_experts_sees_the_increments(layout, implementation):
    model = stacked(layout)
    model.set_experts_implementation(implementation)
    tuned = shaken(attach(model, [LowRankStack()]))
    hand = changed_by_hand(layout, tuned.pairs())
    hand.set_experts_implementation("eager")
    torch.testing.assert_close(logits(tuned, layout), logits(hand, layout), rtol=1e-4, atol=1e-4)
    tuned(**stacked_batch(layout)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.delta_parameters().values())


@pytest.mark.parametrize("layout", STACKED)
def test_merging_unmerging_and_detaching(layout):
    model = stacked(layout)
    before = copy.deepcopy(model.state_dict())
    parameters = {key: id(parameter) for key, parameter in model.named_parameters()}
    tuned = shaken(attach(model, [LowRankStack()]))
    apart = logits(tuned, layout)
    hand = changed_by_hand(layout, tuned.pairs())
    facts = tuned.merge()
    assert facts.tensors == len(tuned.pairs()) and facts.notes == () and facts.max_error < 1e-6
    with tuned.bare() as merged:
        for key, tensor in merged.state_dict().items():
            torch.testing.assert_close(tensor, hand.state_dict()[key], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(logits(merged, layout), apart, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(tuned, layout), apart, rtol=1e-4, atol=1e-5)
    tuned.unmerge()
    assert torch.equal(logits(tuned, layout), apart)
    model = tuned.detach()
    assert {key: id(parameter) for key, parameter in model.named_parameters()} == parameters
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_rounding_of_a_bf16_base_is_counted():
    model = stacked("mixtral", torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    tuned = shaken(attach(model, [LowRankStack()]))
    exact = {site.name: before[site.name].double() + (delta.up @ delta.down).detach().double()
             for site, delta in tuned.pairs()}
    facts = tuned.merge()
    with tuned.bare() as merged:
        rounding = {name: merged.get_parameter(name).double() - tensor for name, tensor in exact.items()}
    assert facts.max_error == pytest.approx(max(float(error.abs().max()) for error in rounding.values()), rel=1e-9)
    changes = sum(float((tensor - before[name].double()).square().sum()) for name, tensor in exact.items())
    assert facts.lost == pytest.approx((sum(float(e.square().sum()) for e in rounding.values()) / changes) ** 0.5, rel=1e-9)
    tuned.unmerge()
    assert all(torch.equal(tensor, before[key]) for key, tensor in tuned.detach().state_dict().items())


@pytest.mark.parametrize("layout", ["convnext", "mixtral", "gpt-oss", "own"])
def test_several_deltas_on_one_tensor_add(layout):
    tuned = shaken(attach(stacked(layout), [LowRankStack(), LowRankStack(rank=3)]))
    hand = changed_by_hand(layout, tuned.pairs())
    apart = logits(tuned, layout)
    torch.testing.assert_close(apart, logits(hand, layout), rtol=1e-4, atol=1e-5)
    tuned.merge()
    torch.testing.assert_close(logits(tuned, layout), apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(("layout", "targets"), [("resnet", "convolution"), ("mixtral", "experts"), ("own", "bilinear")])
def test_increments_are_added_to_overrides_in_either_order(layout, targets, order):
    methods = [Full(targets=targets), LowRankStack(targets=targets)]
    tuned = shaken(attach(stacked(layout), methods[::-1] if order else methods))
    apart = logits(tuned, layout)
    own = {f"{site.path}.{key}": tensor for site, delta in tuned.pairs() for key, tensor in delta.override().items()}
    hand = stacked(layout)
    with torch.no_grad():
        for name, tensor in own.items():
            hand.get_parameter(name).copy_(tensor)
        for site, delta in tuned.pairs():
            if isinstance(delta, LowRankStackDelta):
                hand.get_parameter(site.name).add_((delta.up @ delta.down).reshape(own[site.name].shape))
    torch.testing.assert_close(apart, logits(hand, layout), rtol=1e-4, atol=1e-5)
    facts = tuned.merge()
    assert facts.tensors == len(own)
    torch.testing.assert_close(logits(tuned, layout), apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", STACKED)
def test_saved_and_loaded_bit_for_bit(layout, tmp_path, monkeypatch):
    known, of_name = base.names_in, base._class
    monkeypatch.setattr(base, "names_in", lambda folder: [*known(folder), LowRankStack.name])
    monkeypatch.setattr(base, "_class", lambda name: LowRankStack if name == LowRankStack.name else of_name(name))
    tuned = shaken(attach(stacked(layout), [LowRankStack()]))
    again = restore(stacked(layout), tuned.saved())
    assert torch.equal(logits(again, layout), logits(tuned, layout))
    if layout == "own":  # a native delta names its base by transformers' configuration
        return
    native.save(tuned, tmp_path / "delta")
    loaded = native.load(stacked(layout), tmp_path / "delta")
    assert torch.equal(logits(loaded, layout), logits(tuned, layout))
    assert [site.name for site, _ in loaded.pairs()] == [site.name for site, _ in tuned.pairs()]


@pytest.mark.parametrize("layout", CHECKPOINTING)
def test_checkpointed_activations_give_the_same_gradients(layout):
    tuned = shaken(attach(stacked(layout).train(), [LowRankStack()]))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            tuned.checkpoint_activations()
        tuned.zero_grad()
        tuned(**stacked_batch(layout)).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in tuned.delta_parameters().values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_block_with_replaced_tensors_of_its_own_may_checkpoint_itself():
    """It runs again in backward, when its own tensors would be back: torch found other tensors than in the forward pass."""
    torch.manual_seed(0)
    model = BeitForImageClassification(BeitConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4,
        num_channels=1, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, drop_path_rate=0.0,
        layer_scale_init_value=0.5)).train()
    tuned = shaken(attach(model, [Full()]))
    assert any(".lambda_1" in name or name.endswith("lambda_1") for name in tuned.delta_parameters())
    batch = {"pixel_values": torch.randn(2, 1, 8, 8), "labels": torch.tensor([0, 1])}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            tuned.checkpoint_activations()
        tuned.zero_grad()
        tuned(**batch).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in tuned.delta_parameters().items()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


# ---- lanes -------------------------------------------------------------------------------------------------------------


def test_kernels_of_several_lanes_row_by_row():
    tuned = shaken(attach(stacked("resnet"), [LowRankStack()]))
    tuned.add("other", [LowRankStack(rank=1)])
    shaken(tuned, "other", seed=1)
    alone = []
    for lane in ("other", None, "default"):
        with tuned.use(lane):
            alone.append(logits(tuned, "resnet"))
    with tuned.use(["other", None, "default"]):
        mixed = logits(tuned, "resnet")
    torch.testing.assert_close(mixed, torch.stack([rows[index] for index, rows in enumerate(alone)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", EXPERTS)
def test_experts_of_several_lanes_are_refused_row_by_row(layout):
    tuned = attach(stacked(layout), [LowRankStack()])
    with tuned.use(["default", None, "default"]), pytest.raises(RefusedError, match="row by row"):
        logits(tuned, layout)


# ---- facts, conversion -------------------------------------------------------------------------------------------------


def test_facts_have_the_norm_of_the_change():
    tuned = shaken(attach(stacked("gpt-oss"), [LowRankStack()]))
    for fact, (site, delta) in zip(site_facts(tuned), tuned.pairs(), strict=True):
        assert fact.site == site.name and fact.rank is None and fact.singular is None
        assert fact.norm == pytest.approx(float((delta.up @ delta.down).detach().double().norm()), rel=1e-5)
        assert fact.parameters == delta.up.numel() + delta.down.numel()


def test_no_plain_low_rank_delta_is_made_of_stacks():
    tuned = shaken(attach(stacked("mixtral"), [LoRA(rank=1), LowRankStack()]))
    with pytest.raises(RefusedError, match=r"experts(.|\n)*model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        to_lora(tuned)
    with pytest.raises(RefusedError, match="4 stacks"):
        combine(tuned, {"default": 1.0})


def test_a_method_reads_the_frozen_matrices():
    model = stacked("gpt-oss")
    for site in LowRankStack().sites(model):
        weight = AttachContext(model).weight(site)
        assert weight.shape == (site.slices, site.d_out, site.d_in)
        assert torch.equal(weight[2].T, model.get_parameter(site.name)[2])


# ---- other layers, wrong deltas ----------------------------------------------------------------------------------------


class Adds(Delta):
    def __init__(self, **increments):
        super().__init__()
        self.added = increments

    def increments(self):
        return self.added


class OneOfThem(LowRankStack):
    """One delta, at the first site."""

    def attach(self, sites, context):
        return Attachment({sites[0]: DELTA[0]})


DELTA: list[Delta] = []


def with_delta(layout, delta, **settings) -> Tuned:
    DELTA[:] = [delta]
    return attach(stacked(layout), [OneOfThem(**settings)])


def test_other_tensors_of_a_stacks_layer_get_increments_of_their_own_shape():
    bias = torch.randn(4)
    tuned = with_delta("convnext", Adds(bias=bias))
    hand = stacked("convnext")
    hand.get_submodule(tuned.pairs()[0][0].path).bias.data.add_(bias)
    apart = logits(tuned, "convnext")
    torch.testing.assert_close(apart, logits(hand, "convnext"), rtol=1e-5, atol=1e-6)
    tuned.merge()
    torch.testing.assert_close(logits(tuned, "convnext"), apart, rtol=1e-5, atol=1e-6)


class Both(Adds):
    """An increment of the weight, and an affine change of the output behind it."""

    def after(self, x, y):
        return y * 2.0

    def fold(self, weight, bias):
        return weight * 2.0, None if bias is None else bias * 2.0


class OnLinears(OneOfThem):
    kinds = ("linear",)


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_an_increment_of_a_linear_comes_before_what_is_folded(layout):
    model = toy(layout)
    site = OnLinears(targets="down").sites(model)[0]
    layer = model.get_submodule(site.path)
    increment = torch.randn(layer.weight.shape)
    x = torch.randn(2, site.d_in)
    expected = copy.deepcopy(layer)
    expected.weight.data.add_(increment)
    DELTA[:] = [Both(weight=increment)]
    tuned = attach(model, [OnLinears(targets="down"), LoRA(rank=2, targets="down")])
    torch.testing.assert_close(tuned.model.get_submodule(site.path)(x), expected(x) * 2.0)
    shaken(tuned)
    with torch.no_grad():
        apart = tuned(**toy_batch(layout, labels=False)).logits
        tuned.merge()
        torch.testing.assert_close(tuned(**toy_batch(layout, labels=False)).logits, apart, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("increments", "message"), [
    ({"wieght": torch.zeros(1, 4, 4)}, r"no such tensor.*wieght.*legal: weight, bias.*'weight'"),
    ({"weight": torch.zeros(4, 1, 2, 2)}, r"does not fit.*\(4, 1, 2, 2\).*legal: \(1, 4, 4\)"),
    ({"weight": torch.zeros(1, 4, 1)}, r"does not fit"), ({"bias": torch.zeros(1)}, r"does not fit.*legal: \(4,\)")])
def test_increments_that_do_not_fit_are_refused(increments, message):
    tuned = with_delta("convnext", Adds(**increments))
    for act in (lambda: logits(tuned, "convnext"), tuned.merge):
        with pytest.raises(RefusedError, match=message):
            act()
    assert tuned.merged is None


def test_an_increment_of_integers_is_refused():
    tuned = with_delta("own", Adds(counter=torch.zeros(2, 2)))
    with pytest.raises(RefusedError, match=r"torch\.int64.*bilinear\.counter.*legal: core"):
        logits(tuned, "own")
