"""What calibration counts, against the dumb way: whole forward passes with every layer's inputs kept, row by row unpadded."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltaloom.compact.face import affine_weight
from deltaloom.compress._calibration import calibrated
from deltaloom.data.batches import Batch
from deltaloom.errors import NonFiniteError, RefusedError, SettingsError
from deltaloom.sites import find_sites
from tests.compress.pieces import batches
from tests.toys import MORE_LAYOUTS, toy


def sites_of(model):
    return find_sites(model, "all-linear", ("linear",), keep=lambda site: site.part is None)


def single_rows(batch):
    """Each row of a batch alone and without padding."""
    if "pixel_values" in batch.inputs:
        return [batch.inputs]
    rows = []
    for index, example in enumerate(batch.examples):
        length = len(example.input_ids)
        row = {"input_ids": batch.inputs["input_ids"][index:index + 1, :length]}
        if "decoder_input_ids" in batch.inputs:
            row["decoder_input_ids"] = batch.inputs["decoder_input_ids"][index:index + 1, :len(example.labels)]
        rows.append(row)
    return rows


@torch.no_grad()
def inputs_by_hand(model, found):
    """path -> all inputs (n, d_in) of real tokens, in float64."""
    kept: dict[str, list] = {}
    hooks = [layer.register_forward_pre_hook(
        lambda _, args, path=path: kept.setdefault(path, []).append(args[0].reshape(-1, args[0].shape[-1]).double()))
        for path, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D))]
    for batch in found:
        for row in single_rows(batch):
            model(**row)
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(each) for path, each in kept.items()}


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert", "t5", *MORE_LAYOUTS])
def test_sums_are_those_of_the_unpadded_rows(layout):
    model, found = toy(layout), batches(layout)
    expected = inputs_by_hand(model, found)
    order, counted = [], {}
    for block in calibrated(model, found, sites_of(model), gram=True):
        order.append(sorted(block))
        counted |= block
    assert set(counted) == {site.path for site in sites_of(model)}
    for path, sums in counted.items():
        x = expected[path]
        assert sums.tokens == len(x), path
        torch.testing.assert_close(sums.product(), x.T @ x, rtol=1e-4, atol=1e-4 * float(x.square().sum(0).max()))
        torch.testing.assert_close(sums.squares, sums.product().diagonal())
    assert all(len({path.split(".layer.")[0] for path in block}) >= 1 for block in order)
    norms = {path: sums for block in calibrated(model, found, sites_of(model), gram=False) for path, sums in block.items()}
    for path, sums in norms.items():
        torch.testing.assert_close(sums.squares, counted[path].squares, rtol=1e-4, atol=1e-6)
        with pytest.raises(RefusedError, match="norms"):
            sums.product()


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert", "t5", "bart"])
@pytest.mark.parametrize("span", [1, 2])
def test_each_block_sees_what_the_changed_ones_before_it_make(layout, span):
    model, found = toy(layout), batches(layout)
    sites = sites_of(model)
    earlier = inputs_by_hand(model, found)
    for block in calibrated(model, found, sites, gram=False, span=span):
        now = inputs_by_hand(model, found)  # everything before is changed already, this block is not
        for path, sums in block.items():
            torch.testing.assert_close(sums.squares, now[path].square().sum(0), rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            for path in block:
                affine_weight(model.get_submodule(path)).mul_(0.7)
    last = sites[-1].path
    if span == 1:
        assert not torch.allclose(now[last], earlier[last], rtol=1e-2)


def test_layers_that_read_one_tensor_share_their_sums():
    model = toy("llama")
    block = next(calibrated(model, batches("llama"), sites_of(model), gram=True))
    q, k, o = (block[f"model.layers.0.self_attn.{name}_proj"] for name in "qko")
    assert q is k and q is not o


def test_the_model_is_given_back_as_it_was():
    model = toy("t5").train()
    walk = calibrated(model, batches("t5"), sites_of(model), gram=False)
    next(walk)
    next(walk)
    walk.close()
    assert model.training
    assert all("forward" not in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks
               for module in model.modules())


def test_work_grows_with_the_number_of_blocks_and_not_with_its_square():
    model, found = toy("llama"), batches("llama", count=2)
    model.model.layers.extend(toy("llama", seed).model.layers[0] for seed in range(2, 8))
    model.config.num_hidden_layers = len(model.model.layers)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    calls = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: calls.append(1))
    for _ in calibrated(model, found, sites_of(model), gram=False):
        pass
    layers = len(model.model.layers)
    assert len(calls) <= 2 * layers * len(found) + layers


def test_only_the_blocks_asked_for_are_counted_and_one_that_runs_twice_is_counted_twice():
    model, found = toy("llama"), batches("llama")
    second = find_sites(model, "q", ("linear",), layers=[1])
    assert [list(block) for block in calibrated(model, found, second, gram=False)] == [["model.layers.1.self_attn.q_proj"]]
    model.model.layers[1] = model.model.layers[0]
    sites = find_sites(model, "q", ("linear",))
    (block,) = calibrated(model, found, sites, gram=False)
    x = inputs_by_hand(model, found)["model.layers.0.self_attn.q_proj"]
    assert block["model.layers.0.self_attn.q_proj"].tokens == len(x)
    torch.testing.assert_close(block["model.layers.0.self_attn.q_proj"].squares, x.square().sum(0), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_counted_is_refused():
    model = toy("llama")
    with pytest.raises(SettingsError, match="calibration rows"):
        next(calibrated(model, [], sites_of(model), gram=False))
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[0] = float("inf")
    with pytest.raises(NonFiniteError, match="finite"):
        next(calibrated(model, batches("llama"), sites_of(model), gram=True))


def test_a_layer_whose_rows_are_not_the_batchs_is_refused_unless_all_tokens_are_real():
    model = toy("llama")
    found = batches("llama", count=1)
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda _, args: (args[0].reshape(-1, args[0].shape[-1])[:5],), prepend=True)
    down.register_forward_hook(lambda _, args, out: torch.zeros(*found[0].inputs["input_ids"].shape, out.shape[-1]))
    sites = find_sites(model, "down", ("linear",), layers=[0])
    with pytest.raises(RefusedError, match="padding"):
        next(calibrated(model, found, sites, gram=False))
    full = Batch({"input_ids": found[0].inputs["input_ids"][:, :3]}, None, found[0].examples,
                 torch.full((4,), 3), 12)
    down._forward_hooks.clear()
    down.register_forward_hook(lambda _, args, out: torch.zeros(4, 3, out.shape[-1]))
    assert next(calibrated(model, [full], sites, gram=False))["model.layers.0.mlp.down_proj"].tokens == 5
