"""A group of layers as one tensor: the factors of a layer are those of the definition, and every layer is in its own group."""

import copy
import math

import pytest
import torch
from torch import nn

from deltaloom.deltas._tensor_group import Member, grouped
from deltaloom.deltas.base import keep_rows
from deltaloom.deltas.tsvd import TSVD
from deltaloom.linalg import transforms
from deltaloom.sites import Site, find_sites
from deltaloom.stacks import register_site
from deltaloom.tuned import attach, restore
from tests.contract.cases import perturb
from tests.deltas.tensor_oracles import TRANSFORMS, by_frequency, dense, groups_of, members, new_group, transform_of
from tests.toys import toy

each_transform = pytest.mark.parametrize("name", TRANSFORMS)
each_count = pytest.mark.parametrize("layers", [1, 2, 3, 5, 8])


def changes(group):
    """(N, d_out, d_in) by the factors of each layer."""
    found = []
    for layer in range(group.layers):
        down, scale, up = group.factors(layer)
        found.append(torch.einsum("or,r,ri->oi", up, scale, down))
    return torch.stack(found).detach()


@each_transform
@each_count
def test_factors_of_a_layer_are_its_slice_of_the_reconstruction(name, layers):
    group = new_group(name, layers)
    expected = dense(group, transform_of(name, layers, group.skew))
    assert expected.abs().amax((1, 2)).min() > 0.1
    torch.testing.assert_close(changes(group), expected, rtol=0, atol=1e-12)
    slices = torch.stack([group.slice(layer) for layer in range(layers)])
    torch.testing.assert_close(slices.detach(), expected, rtol=0, atol=1e-12)


@each_count
def test_the_dft_is_the_inverse_transform_of_complex_slices(layers):
    group = new_group("dft", layers)
    half = []
    us, ss, vs = by_frequency(group.triplets, transform_of("dft", layers))
    for u, s, v in zip(us, ss, vs, strict=True):
        pair = u.shape[1] == 2 * len(s)
        u, v = (torch.complex(*m.chunk(2, 1)) if pair else m + 0j for m in (u, v))
        half.append((u * s) @ v.mH / (math.sqrt(2) if pair else 1))
    whole = torch.fft.irfft(torch.stack(half), n=layers, dim=0, norm="ortho")
    torch.testing.assert_close(changes(group), group.scale * whole, rtol=0, atol=1e-12)


@each_transform
@each_count
def test_a_layer_holds_only_the_rows_that_reach_it(name, layers):
    group = new_group(name, layers)
    transform = transform_of(name, layers)
    for layer in range(layers):
        reach = transform.weights[:, layer] != 0
        if transform.turns is not None:
            reach |= transform.turns[:, layer] != 0
        count = sum(width * 2 for width, here in zip(transform.width, reach, strict=True) if here or name == "learned")
        assert all(count == size for size in (len(group.factors(layer)[0]), len(group.factors(layer)[1])))
        most = {"identity": 1, "frame": 2, "haar": 1 + math.ceil(math.log2(layers))}.get(name)
        assert most is None or count <= 2 * most
    assert name not in ("identity", "frame") or count < 2 * len(transform.weights) or layers == 1


def test_the_frequency_of_the_cosine_that_vanishes_at_a_layer_is_left_out():
    assert [len(new_group("dct", 3).factors(layer)[1]) for layer in range(3)] == [6, 4, 6]


@each_transform
def test_masked_entries_count_in_training_and_are_silent_else(name):
    group = new_group(name, 5)
    transform = transform_of(name, 5, group.skew)
    whole = dense(group, transform)
    group.triplets.mask[::3] = False
    torch.testing.assert_close(changes(group), whole, rtol=0, atol=1e-12)
    group.eval()
    kept = copy.deepcopy(group)
    with torch.no_grad():
        kept.triplets.core[::3] = 0
    expected = dense(kept, transform)
    assert (expected - whole).abs().max() > 0.1
    torch.testing.assert_close(changes(group), expected, rtol=0, atol=1e-12)


@each_transform
@each_count
def test_removing_masked_entries_again_and_again_changes_no_slice(name, layers):
    group = new_group(name, layers, rank=4)
    transform = transform_of(name, layers, group.skew)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        changes(group)  # rows that reach a layer are remembered; what is removed has to be forgotten
        mask = torch.rand(len(group.triplets.core), generator=generator) > 0.3
        mask[0] = True
        group.triplets.mask.copy_(mask)
        before = changes(group.eval())
        group.triplets.keep(mask.nonzero().squeeze(1), keep_rows)
        assert len(group.triplets.core) == int(mask.sum())
        torch.testing.assert_close(changes(group), before, rtol=0, atol=1e-12)
        torch.testing.assert_close(dense(group, transform), before, rtol=0, atol=1e-12)
        group.train()


@each_transform
def test_a_group_of_which_nothing_is_left_changes_nothing(name):
    group = new_group(name, 3)
    group.triplets.keep(torch.tensor([], dtype=torch.long), keep_rows)
    assert not changes(group).any() and changes(group).shape == (3, 6, 5)
    assert group.triplets.residual() == 0.0 and len(group.index()) == 0


@each_transform
def test_initial_vectors_are_orthonormal_at_every_frequency(name):
    group = new_group(name, 5, shaken=False)
    assert group.triplets.residual() < 1e-6
    for matrices in by_frequency(group.triplets, transform_of(name, 5))[::2]:
        for matrix in matrices:
            if matrix.shape[1] == 4:
                matrix = torch.complex(*matrix.chunk(2, 1))
            gap = matrix.mH @ matrix - torch.eye(2)
            assert gap.abs().max() < 1e-6
    assert not changes(group).any()


def test_an_index_counts_within_its_frequency():
    group = new_group("dft", 5, rank=3)
    assert group.index().tolist() == [0, 1, 2] * 3
    group.triplets.keep(torch.tensor([0, 2, 3, 7]), keep_rows)
    assert group.index().tolist() == [0, 1, 0, 0]


def test_a_copy_remembers_nothing_of_the_rows_that_reached_a_layer():
    """Versions of tensors count anew in a copy: what was remembered for others would be taken for its own."""
    one = copy.deepcopy(new_group("identity", 4, rank=1))
    changes(one)
    one.set_transform(transforms.haar(4))
    one.set_transform(transforms.dct(4))
    other = copy.deepcopy(one)
    torch.testing.assert_close(changes(other), dense(other, transforms.dct(4)), rtol=0, atol=1e-6)


# ---- which layers make a group -----------------------------------------------------------------------------------------


def named(model, targets="all-linear", kinds=("linear", "stack")):
    return grouped(find_sites(model, targets, kinds))


def test_layers_of_one_role_and_shape_are_in_order_of_depth():
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(4, 4)}) for _ in range(12))})
    found = named(model)
    assert list(found) == ["q-4x4"]
    assert [member.site.layer for member in found["q-4x4"]] == list(range(12))


def test_grouped_queries_keys_and_values_have_groups_of_their_own():
    found = named(toy("llama"))
    assert {name: [member.site.layer for member in each] for name, each in found.items()} == {
        name: [0, 1] for name in ("q-16x16", "k-8x16", "v-8x16", "o-16x16", "gate-24x16", "up-24x16", "down-16x24")}


def test_conv1d_is_seen_as_output_by_input_and_parts_of_it_are_groups():
    assert list(named(toy("gpt2"))) == ["qkv-48x16", "o-16x16", "up-64x16", "down-16x64"]
    found = named(toy("gpt2"), ("q", "v"))
    assert list(found) == ["q-16x16", "v-16x16"]
    assert [member.site.part for member in found["v-16x16"]] == [(32, 48)] * 2


@pytest.mark.parametrize("layout", ["t5", "bart"])
def test_encoder_decoder_and_cross_attention_do_not_mix(layout):
    found = named(toy(layout))
    for role in ("q", "k", "v", "o"):
        groups = [each for name, each in found.items() if name.startswith(f"{role}-")]
        assert [[member.site.layer for member in each] for each in groups] == [[0, 1]] * 3
        assert len({(each[0].site.stack, each[0].site.path.split(".")[-2]) for each in groups}) == 3
    every = [member.site.name for each in found.values() for member in each]
    assert len(set(every)) == len(every)


def test_layers_of_other_shapes_or_outside_of_blocks_are_groups_of_one():
    found = named(toy("bert"), "all")
    assert {name: len(each) for name, each in found.items() if len(each) == 1} == {"pooler-16x16": 1, "head-3x16": 1}


def test_slices_of_a_stack_follow_one_another():
    sites = [Site(f"layers.{layer}.experts", "stack", "up", 4, 3, layer, "layers", tensor="up", slices=2) for layer in range(3)]
    found = grouped(sites)["up-3x4"]
    assert [(member.site.layer, member.slice) for member in found] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [(place, site.layer, count) for place, (site, count) in Member.runs(found)] == [(0, 0, 2), (2, 1, 2), (4, 2, 2)]


def test_names_are_legal_for_modules_whatever_the_role():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = nn.Parameter(torch.zeros(3, 4))

        def forward(self, x):
            return x @ self.core.T

    register_site(Odd, "core", role="a.b/c")
    tuned = attach(nn.Sequential(nn.Linear(4, 4), Odd()), [TSVD(rank=1, targets="all")])
    perturb(tuned)
    names = list(groups_of(tuned))
    assert names == ["layer-4x4", "a-b/c-3x4"]
    other = restore(nn.Sequential(nn.Linear(4, 4), Odd()), tuned.saved())
    assert all(torch.equal(other.delta_state()[key], tensor) for key, tensor in tuned.delta_state().items())


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert", "t5", "bart"])
def test_groups_are_the_same_when_a_delta_is_loaded(layout):
    tuned = attach(toy(layout), [TSVD(rank=1, targets="all")])
    perturb(tuned)
    names = list(groups_of(tuned))
    assert len(set(names)) == len(names) and all(name and not set(name) & {".", ":"} for name in names)
    loaded = restore(toy(layout), tuned.saved())
    assert members(loaded) == members(tuned)
    assert all([place for _, place in each] == list(range(len(each))) for each in members(tuned).values())
    assert sorted(site.name for each in members(tuned).values() for site, _ in each) == sorted(s.name for s, _ in tuned.pairs())


def test_rounded_factors_follow_the_parameters_however_they_are_written():
    tuned = attach(toy("llama", dtype=torch.bfloat16), [TSVD(rank=2, transform="dct")])
    group = next(iter(tuned.attached()[0].attachment.shared.values()))
    first = group.rounded(0, torch.bfloat16)
    assert first is not None and group.rounded(1, torch.bfloat16) is first
    with torch.no_grad():
        group.triplets.up.data.mul_(2)  # as some optimizers do: no version counts it
    again = group.rounded(0, torch.bfloat16)
    assert again is not None
    assert torch.equal(again[1], 2 * first[1])
    assert torch.equal(again[0], group.triplets.down.to(torch.bfloat16))
