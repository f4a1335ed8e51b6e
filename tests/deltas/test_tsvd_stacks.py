"""The t-SVD delta on what is no affine layer: kernels, parameters of experts, a user's own layer."""

import copy

import pytest
import torch

from deltaloom.checkpoint import native
from deltaloom.checkpoint.convert import to_lora
from deltaloom.deltas.tsvd import TSVD, TsvdStackDelta
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.sites import stack_stored
from deltaloom.tuned import attach
from tests.contract.cases import assert_same_tensors, gradients, perturb, state
from tests.deltas.tensor_oracles import TRANSFORMS, dense_of_saved, groups_of, members, numbers, train
from tests.stacks import STACKED, stacked, stacked_batch


def answers(model, layout):
    with torch.no_grad():
        return model(**stacked_batch(layout)).logits


def tuned_of(layout, transform="haar", **settings):
    return attach(stacked(layout), [TSVD(**{"rank": 1, "transform": transform, "targets": ("all",)} | settings)])


@pytest.mark.parametrize("layout", STACKED)
def test_trains_merges_and_comes_back(layout, tmp_path):
    routers = ("!router",) if layout == "llama4" else ()  # a linear layer by its class that gives a pair
    tuned = tuned_of(layout, targets=("all", *routers))
    assert torch.equal(answers(tuned, layout), answers(stacked(layout), layout))
    assert {site.kind for site, _ in tuned.pairs()} >= {"stack"} and tuned.never_ran() == []
    batch = stacked_batch(layout)
    start = numbers(tuned)
    losses = train(tuned, lambda: tuned(**batch).loss, 14)
    assert losses[-1] < losses[0] and numbers(tuned) < start
    apart = answers(tuned, layout)
    native.save(tuned, tmp_path / "d")
    loaded = native.load(stacked(layout), tmp_path / "d")
    assert_same_tensors(state(loaded), state(tuned))
    assert torch.equal(answers(loaded, layout), apart)
    before = copy.deepcopy(stacked(layout).state_dict())
    tuned.merge()
    torch.testing.assert_close(answers(tuned, layout), apart, rtol=1e-4, atol=1e-4)
    tuned.unmerge()
    assert_same_tensors(tuned.detach().state_dict(), before)


@pytest.mark.parametrize("transform", [name for name in TRANSFORMS if name != "data"])
@pytest.mark.parametrize("layout", ["resnet", "mixtral", "gpt-oss", "own"])
def test_slices_are_those_of_the_reconstruction_with_the_gradients_of_the_parameters(layout, transform):
    tuned = tuned_of(layout, transform, targets=("re:.*(weight|proj|core)",))
    perturb(tuned)
    model = stacked(layout)
    slices = {key: dense_of_saved(group) for key, group in groups_of(tuned).items()}
    changed = {}
    with torch.no_grad():
        for key, each in members(tuned).items():
            for site, place in each:
                parameter = model.get_parameter(site.name if site.kind == "stack" else f"{site.path}.weight")
                count = site.slices if site.kind == "stack" else 1
                own = slices[key][place:place + count]
                parameter += (stack_stored(site, own, parameter.shape) if site.kind == "stack" else own[0]).float()
                changed[key, place] = (site, parameter)
    torch.testing.assert_close(answers(tuned, layout), answers(model, layout), rtol=1e-3, atol=1e-4)
    tuned(**stacked_batch(layout)).loss.backward()
    model(**stacked_batch(layout)).loss.backward()
    found = gradients(tuned)
    for key, group in groups_of(tuned).items():
        tuned.zero_grad()
        loss = 0.0
        for (name, place), (site, parameter) in changed.items():
            if name == key:
                for index in range(site.slices if site.kind == "stack" else 1):
                    dense = parameter.grad
                    if site.kind == "stack":
                        shape = (site.slices, site.d_in, site.d_out) if site.transposed else (site.slices, site.d_out, site.d_in)
                        dense = dense.reshape(shape)[index]
                        dense = dense.T if site.transposed else dense
                    loss = loss + (group.slice(place + index) * dense).sum()
        loss.backward()
        for name, parameter in group.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(found[f"0:shared.{key}:{name}"], parameter.grad, rtol=1e-3, atol=1e-4)


def test_experts_of_all_layers_are_one_tensor():
    tuned = tuned_of("mixtral", targets=("experts",))
    assert {key: group.layers for key, group in groups_of(tuned).items()} == {"gate_up-48x16": 8, "down-16x24": 8}
    assert all(isinstance(delta, TsvdStackDelta) for _, delta in tuned.pairs())
    assert {(site.layer, delta.layers) for site, delta in tuned.pairs()} == {(0, range(4)), (1, range(4, 8))}


def test_the_penalty_of_a_stack_counts_once():
    tuned = tuned_of("mixtral", targets=("experts",), penalty="loss")
    perturb(tuned)
    terms = [delta.penalty() for _, delta in tuned.pairs()]
    assert [term is None for term in terms] == [False, False, True, True]
    assert all(delta.orthogonality() > 0.01 for _, delta in tuned.pairs())


@pytest.mark.parametrize("settings", [{"transform": "data"}, {"dropout": 0.1}])
def test_what_needs_a_layers_inputs_is_refused_and_names_the_stacks(settings):
    with pytest.raises(SettingsError, match=r"inputs of affine layers[\s\S]*experts\.gate_up_proj"):
        attach(stacked("mixtral"), [TSVD(rank=1, targets="all", **settings)])
    assert attach(stacked("mixtral"), [TSVD(rank=1, targets="all-linear", **settings)]).counts()[0] > 0


def test_a_stack_is_no_plain_low_rank_delta():
    tuned = tuned_of("mixtral")
    with pytest.raises(RefusedError, match="not kernels, experts or other stacks"):
        to_lora(tuned)
