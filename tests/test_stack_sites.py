"""Which parameters are stacks, how they are seen, what targets reach them, and what can be registered."""

import math

import pytest
import torch
from torch import nn

import deltaloom
from deltaloom.deltas.full import Full
from deltaloom.deltas.lora import LoRA
from deltaloom.errors import TargetError
from deltaloom.sites import all_sites, find_sites, stack_matrices, stack_stored
from deltaloom.stacks import register_site
from tests.stacks import CONVOLUTIONAL, EXPERTS, STACKED, TURNED, Bilinear, Own, stacked


def stack_sites(model, targets="all"):
    return find_sites(model, targets, ["stack"])


def names(sites):
    return [site.name for site in sites]


@pytest.mark.parametrize("layout", STACKED)
def test_the_stacks_are_the_kernels_and_the_tensors_of_experts(layout):
    model = stacked(layout)
    sites = stack_sites(model)
    if layout in CONVOLUTIONAL:
        expected = [f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    else:
        expected = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    assert names(sites) == expected and expected
    every = [site.name for site in all_sites(model) if site.kind != "attention"]  # gpt-oss has tensors of its own in these
    assert len(set(every)) == len(every)


@pytest.mark.parametrize("layout", EXPERTS)
def test_experts_are_seen_as_output_by_input_and_have_roles(layout):
    model = stacked(layout)
    width = model.config.hidden_size
    for site in stack_sites(model):
        assert site.role in ("gate_up", "down") and site.slices == 4 and site.stack == "model.layers"
        assert width == (site.d_in if site.role == "gate_up" else site.d_out)
        assert site.transposed == (layout in TURNED)


def test_kernels_are_seen_unfolded():
    model = stacked("convnext")
    for site in stack_sites(model):
        layer = model.get_submodule(site.path)
        inputs = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        assert (site.slices, site.d_out, site.d_in) == (1, layer.out_channels, inputs)
        image = torch.randn(1, layer.in_channels, 8, 8)
        columns = nn.functional.unfold(image, layer.kernel_size, padding=layer.padding, stride=layer.stride)
        if layer.groups == 1:
            dense = stack_matrices(site, layer.weight)[0] @ columns[0] + layer.bias[:, None]
            torch.testing.assert_close(layer(image)[0].flatten(1), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", STACKED)
def test_seeing_and_storing_are_inverse(layout):
    model = stacked(layout)
    for site in stack_sites(model):
        parameter = model.get_parameter(site.name)
        matrices = stack_matrices(site, parameter)
        assert matrices.shape == (site.slices, site.d_out, site.d_in)
        assert torch.equal(stack_stored(site, matrices, parameter.shape), parameter)
        if site.transposed:
            assert torch.equal(matrices[1], parameter[1].T)


def test_transposed_convolutions_and_one_or_three_dimensions():
    model = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Conv3d(2, 3, (1, 2, 3)), nn.ConvTranspose1d(6, 4, 5))
    sizes = [(site.slices, site.d_out, site.d_in, site.transposed) for site in stack_sites(model)]
    assert sizes == [(1, 6, 6, False), (1, 3, 12, False), (1, 20, 6, True)]


def test_vectors_holders_integers_and_what_lies_outside_of_blocks_are_no_stacks():
    class Holds(nn.Module):
        def __init__(self, *shape, dtype=torch.float32):
            super().__init__()
            self.some = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)

    block = nn.ModuleList([Holds(2, 3, 4), Holds(1, 1, 4), Holds(0, 3, 4), Holds(2, 3), Holds(2, 3, 4, 5),
                           Holds(2, 3, 4, dtype=torch.int8), nn.ParameterList([torch.zeros(2, 3, 4)]),
                           nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 4))])
    model = nn.ModuleDict({"layers": block, "outside": Holds(2, 3, 4)})
    assert names(stack_sites(model)) == ["layers.0.some"]


# ---- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "expected"), [
    ("all", 4), ("mlp", 4), ("gate_up", 2), ("down", 2), ("experts", 4), ("down_proj", 2), ("experts.down_proj", 2),
    ("model.layers.0.mlp.experts", 2), ("model.layers.0.mlp.experts.down_proj", 1), ("*.1.*experts", 2),
    ("*experts.gate_up_proj", 2), ("re:.*down_proj", 2), ("re:.*0.mlp.experts", 2), (("all", "!gate_up"), 2),
    (("experts", "!down_proj"), 2)])
def test_targets_reach_stacks(target, expected):
    assert len(stack_sites(stacked("mixtral"), target)) == expected


@pytest.mark.parametrize("target", ["all-linear", "attention", "gate_upp"])
def test_targets_that_reach_no_stack(target):
    with pytest.raises(TargetError) as error:
        stack_sites(stacked("mixtral"), target)
    assert target != "gate_upp" or "gate_up" in str(error.value)


def test_a_stack_and_a_layer_of_one_name_are_both_reached():
    both = find_sites(stacked("llama4"), "down_proj", ["linear", "stack"])
    assert {site.kind for site in both} == {"linear", "stack"}
    model = nn.ModuleDict({"a": nn.ModuleDict({"mixer": nn.Linear(2, 3)}), "b": nn.ModuleDict({"mixer": nn.Conv1d(2, 3, 1)})})
    assert names(find_sites(model, "mixer", ["linear", "stack"])) == ["a.mixer", "b.mixer.weight"]


def test_layers_choose_blocks():
    found = find_sites(stacked("mixtral"), "all", ["stack"], [1])
    assert names(found) == ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]


@pytest.mark.parametrize("layout", STACKED)
def test_methods_without_stacks_have_the_sites_that_they_had(layout):
    """Whole leftover modules stay sites of full tuning, and a stack is no site of a method that does not ask for it."""
    model = stacked(layout)
    full = Full().sites(model)
    stacks = {site.path for site in stack_sites(model)}
    assert stacks <= {site.path for site in full if site.kind == "tensors"}
    reached = {f"{site.path}.{name}" for site in full
               for name, _ in model.get_submodule(site.path).named_parameters(recurse=False)}
    assert reached == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert all(site.name == site.path and site.kind != "stack" for site in full)
    if layout not in ("own", "resnet"):
        assert stacks.isdisjoint(site.path for site in LoRA(targets="all").sites(model))


# ---- registering -------------------------------------------------------------------------------------------------------


def fresh(*shape, dtype=torch.float32):
    """A new type of layer each time, so that tests do not see one another's registrations."""
    class Fresh(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
            self.register_parameter("absent", None)
    return Fresh


def one(layer_type):
    return stack_sites(nn.ModuleDict({"mine": layer_type()}))


@pytest.mark.parametrize(("shape", "seen"), [((2, 3), (1, 2, 3)), ((2, 3, 4), (2, 3, 4)), ((2, 3, 4, 5), (1, 2, 60))])
def test_a_registered_parameter_is_a_site_by_default_shapes(shape, seen):
    layer_type = fresh(*shape)
    deltaloom.register_site(layer_type, "core")
    site, = one(layer_type)
    assert (site.slices, site.d_out, site.d_in) == seen and site.name == "mine.core" and site.role == "core"


def test_matrices_and_role_are_the_users():
    layer_type = fresh(2, 3, 4, 5)
    register_site(layer_type, "core", matrices=lambda shape: (shape[0] * shape[1], shape[2], shape[3]), role="mixing")
    site, = one(layer_type)
    assert (site.slices, site.d_out, site.d_in) == (6, 4, 5) and site.role == "mixing"
    assert one(layer_type) == find_sites(nn.ModuleDict({"mine": layer_type()}), "mixing", ["stack"])


def test_subclasses_count_and_come_before_their_bases():
    layer_type = fresh(2, 3, 4)
    derived = type("Derived", (layer_type,), {})
    register_site(layer_type, "core", role="base")
    assert one(derived)[0].role == "base"
    register_site(derived, "core", matrices=lambda shape: (1, 6, 4), role="derived")
    assert (one(derived)[0].role, one(derived)[0].d_out) == ("derived", 6) and one(layer_type)[0].role == "base"


def test_what_is_registered_comes_before_the_general_rule():
    class Kernel(nn.Conv2d):
        pass

    model = nn.ModuleDict({"conv": Kernel(2, 4, 3)})
    assert (stack_sites(model)[0].slices, stack_sites(model)[0].d_in) == (1, 18)
    register_site(Kernel, "weight", matrices=lambda shape: (shape[0] * shape[1], shape[2], shape[3]))
    assert names(stack_sites(model)) == ["conv.weight"] and stack_sites(model)[0].slices == 8
    assert names(stack_sites(nn.ModuleDict({"conv": nn.Conv2d(2, 4, 3)}))) == ["conv.weight"]


def test_registering_again_is_harmless_with_the_same_meaning_only():
    layer_type = fresh(2, 3, 4)
    for _ in range(2):
        register_site(layer_type, "core", matrices=lambda shape: (1, 6, 4), role="r")  # a new function with the same lines
    with pytest.raises(TargetError, match="another meaning"):
        register_site(layer_type, "core", matrices=lambda shape: (2, 3, 4), role="r")
    with pytest.raises(TargetError, match="another meaning"):
        register_site(layer_type, "core", matrices=lambda shape: (1, 6, 4), role="other")
    with pytest.raises(TargetError, match="another meaning"):
        register_site(layer_type, "core")
    assert one(layer_type)[0].d_out == 6
    for size in (1, 2):
        other = fresh(2, 3, 4)
        register_site(other, "core", matrices=lambda shape, size=size: (size, 12 // size, 2))
        with pytest.raises(TargetError, match="another meaning"):
            register_site(other, "core", matrices=lambda shape, size=size + 1: (size, 12 // size, 2))


@pytest.mark.parametrize("seen", [(2, 3, 5), (24,), (-2, -3, 4), (0, 3, 4), (2.0, 3, 4), (1, 1, 2, 12)])
def test_matrices_that_do_not_fit_are_refused(seen):
    layer_type = fresh(2, 3, 4)
    register_site(layer_type, "core", matrices=lambda shape: seen)
    with pytest.raises(TargetError, match=r"do not fit.*mine\.core.*24"):
        one(layer_type)


def test_a_vector_needs_matrices():
    layer_type = fresh(6)
    register_site(layer_type, "core")
    with pytest.raises(TargetError, match=r"no matrix.*`matrices`"):
        one(layer_type)
    other = fresh(6)
    register_site(other, "core", matrices=lambda shape: (1, 2, 3))
    assert one(other)[0].d_in == 3


def test_an_unknown_parameter_is_refused_and_one_that_is_none_is_no_site():
    layer_type = fresh(2, 3, 4)
    register_site(layer_type, "absent")
    assert [site.kind for site in all_sites(nn.ModuleDict({"mine": layer_type()}))] == ["tensors"]
    register_site(layer_type, "cor")
    with pytest.raises(TargetError, match=r"mine\.cor'.*legal: core.*'core'"):
        one(layer_type)


def test_integers_are_refused():
    layer_type = fresh(2, 3, 4, dtype=torch.int8)
    register_site(layer_type, "core")
    with pytest.raises(TargetError, match=r"floating point.*int8"):
        one(layer_type)


@pytest.mark.parametrize(("layer_type", "tensor"), [(Bilinear(2, 2), "core"), (dict, "core"), (Own, "bilinear.core"), (Own, "")])
def test_what_cannot_be_registered(layer_type, tensor):
    with pytest.raises(TargetError):
        register_site(layer_type, tensor)
