"""The t-SVD delta merged, exported to plain low-rank deltas, and copied."""

import copy
import math

import pytest
import torch

from deltaloom.checkpoint.convert import put_back, to_lora
from deltaloom.deltas._triplets import Triplets
from deltaloom.deltas.base import keep_rows
from tests.contract.cases import logits
from tests.deltas.tensor_oracles import TRANSFORMS, deep_bert, groups_of, tuned_of

each_transform = pytest.mark.parametrize("name", TRANSFORMS)


@each_transform
@pytest.mark.parametrize("masked", [False, True])
def test_merged_exported_and_apart_are_one_model(name, masked):
    tuned = tuned_of(name, dtype=torch.float32).eval()
    if masked:
        for group in groups_of(tuned).values():
            group.triplets.mask[::2] = False
    apart = logits(tuned, "bert")
    assert (apart - logits(deep_bert(), "bert")).abs().max() > 0.01
    converted = to_lora(tuned)
    assert converted.relative_error == 0
    tuned.merge()
    torch.testing.assert_close(logits(tuned, "bert"), apart, rtol=1e-5, atol=1e-5)
    tuned.unmerge()
    assert torch.equal(logits(tuned, "bert"), apart)
    torch.testing.assert_close(logits(put_back(tuned.detach(), converted), "bert"), apart, rtol=1e-5, atol=1e-5)


@each_transform
def test_a_truncated_exports_error_is_the_energy_of_the_tail(name):
    tuned = tuned_of(name)
    values = [torch.linalg.svdvals(delta.matrix().detach()) for _, delta in tuned.pairs()]
    tail, whole = (math.sqrt(sum(float(each[start:].square().sum()) for each in values)) for start in (1, 0))
    assert to_lora(tuned, rank=1).relative_error == pytest.approx(tail / whole, rel=1e-5)


def test_layers_of_which_nothing_is_left_are_left_out_of_the_export():
    tuned = tuned_of("identity", targets="q", dtype=torch.float32)
    group, = groups_of(tuned).values()
    group.triplets.keep(torch.tensor([0, 1, 2, 6]), keep_rows)
    apart = logits(tuned, "bert")
    assert [len(delta.factors()[1]) for _, delta in tuned.pairs()] == [3, 0, 1]
    for rank in (None, 3):
        converted = to_lora(tuned, rank=rank)
        assert converted.relative_error == 0
        other = put_back(deep_bert(), converted)
        torch.testing.assert_close(logits(other, "bert"), apart, rtol=1e-5, atol=1e-5)
        assert [len(delta.factors()[1]) for _, delta in other.pairs()] == [3, 1]


@each_transform
def test_a_copy_keeps_layers_and_group_together(name):
    tuned = tuned_of(name, dtype=torch.float32)
    before = logits(tuned, "bert")
    assert not torch.allclose(before, logits(deep_bert(), "bert"))
    copied = copy.deepcopy(tuned)
    assert torch.equal(logits(copied, "bert"), before)
    for group in groups_of(copied).values():
        with torch.no_grad():
            group.triplets.core.zero_()
    assert torch.equal(logits(copied, "bert"), logits(deep_bert(), "bert"))
    assert torch.equal(logits(tuned, "bert"), before)
    assert [module for module in copied.modules() if isinstance(module, Triplets)] \
        == [group.triplets for group in groups_of(copied).values()]
