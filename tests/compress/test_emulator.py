"""The emulator: what is kept is bit for bit the original's, under its new name; the middle is what the steps make."""

from __future__ import annotations

import copy

import pytest
import torch

from deltaloom.compress.base import check_kept, tensor_hash
from deltaloom.compress.drop_layers import DropLayers
from deltaloom.compress.emulator import Emulator, verify
from deltaloom.errors import CheckpointError, RefusedError, SettingsError, TargetError
from tests.compress.works import deep_toy, meta_of, work_on
from tests.toys import LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("middle", [0, 2, ({"method": "drop-layers", "keep": 2, "choose": "block-influence"},)],
                         ids=["none", "number", "steps"])
def test_everything_but_the_middle_is_bit_for_bit_the_original(layout, middle):
    model = deep_toy(layout, 7)
    original = copy.deepcopy(model)
    facts = Emulator(middle=middle, keep_first=2, keep_last=1).apply(work_on(model, layout))
    state, before = model.state_dict(), original.state_dict()
    assert {record["tensor"] for record in facts.hashes} <= set(state)
    for record in facts.hashes:
        assert torch.equal(state[record["tensor"]], before[record["original"]])
        assert tensor_hash(before[record["original"]]) == record["sha256"]
    blocks = 3 if middle == 0 else 5
    stacks = {"llama": ["model.layers"], "gpt2": ["transformer.h"], "bert": ["bert.encoder.layer"],
              "t5": ["encoder.block", "decoder.block"]}[layout]
    inside = {f"{stack}.{layer}." for stack in stacks for layer in range(2, blocks - 1)}
    free = {name for name in state if name.startswith(tuple(inside) or ("\0",))}
    assert {record["tensor"] for record in facts.hashes} == set(state) - free
    verify(model, facts.hashes)
    verify(original, facts.hashes, original=True)


def test_a_changed_tensor_is_found():
    model = deep_toy("llama", 6)
    facts = Emulator(middle=1).apply(work_on(model, "llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0].add_(1e-6)
    with pytest.raises(RefusedError, match=r"model.layers.1.mlp.up_proj.weight"):
        verify(model, facts.hashes)
    with pytest.raises(CheckpointError):
        verify(model, [])
    with pytest.raises(RefusedError):
        check_kept(deep_toy("llama", 2, seed=3), facts.hashes)


def test_the_middle_by_number_is_the_even_drop():
    model, other = deep_toy("llama", 9), deep_toy("llama", 9)
    Emulator(middle=3, keep_first=2, keep_last=2).apply(work_on(model, "llama"))
    DropLayers(keep=3, choose="uniform", keep_first=2, keep_last=2).apply(work_on(other, "llama"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_what_cannot_be_kept_is_refused_on_the_sketch():
    with pytest.raises(TargetError, match="no block between"):
        Emulator(middle=1).sketch(meta_of(deep_toy("llama", 4)))
    with pytest.raises(RefusedError, match="cannot keep that many"):
        Emulator(middle=5).sketch(meta_of(deep_toy("llama", 6)))
    for middle in ((), ({"method": "emulator", "middle": 1},), ({"method": "drop-layer"},)):
        with pytest.raises(SettingsError):
            Emulator(middle=middle)


def test_hashes_tell_types_shapes_and_signs_apart():
    tensors = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.bfloat16), -torch.zeros(4), torch.zeros(()),
               torch.zeros(0), torch.zeros(8, dtype=torch.bfloat16)]
    assert len({tensor_hash(tensor) for tensor in tensors}) == len(tensors)
    assert tensor_hash(torch.arange(6.0).view(2, 3).T) == tensor_hash(torch.arange(6.0).view(2, 3).T.contiguous())
