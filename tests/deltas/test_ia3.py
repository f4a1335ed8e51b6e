from __future__ import annotations

import pytest
import torch

from deltaloom.deltas.ia3 import IA3
from deltaloom.errors import TargetError
from deltaloom.tuned import attach
from tests.contract.cases import perturb
from tests.toys import toy, toy_batch


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert", "t5", "phi3", "bart", "vit"])
def test_default_scales_keys_values_and_the_input_of_the_last_mlp_layer(layout: str) -> None:
    tuned = attach(toy(layout), [IA3()])
    found = {(site.role, delta.feedforward) for site, delta in tuned.pairs()}
    assert found == {("k", False), ("v", False), ("down", True)}
    stacks = {"t5": 3, "bart": 3}  # attentions: encoder, decoder, cross
    blocks = 2 * stacks.get(layout, 1)
    assert sum(site.role == "k" for site, _ in tuned.pairs()) == blocks


@pytest.mark.parametrize("layout", ["llama", "gpt2", "phi3"])
def test_equals_scaled_weights(layout: str) -> None:
    tuned, oracle = attach(toy(layout), [IA3()]), toy(layout)
    perturb(tuned)
    with torch.no_grad():
        for site, delta in tuned.pairs():
            layer = oracle.get_submodule(site.path)
            weight = layer.weight.T if layout == "gpt2" else layer.weight
            rows = slice(*site.part) if site.part else slice(None)
            if delta.feedforward:
                weight[rows] *= delta.vector
            else:
                weight[rows] *= delta.vector[:, None]
                if layer.bias is not None:
                    layer.bias[rows] *= delta.vector
        torch.testing.assert_close(tuned(**toy_batch(layout)).logits, oracle(**toy_batch(layout)).logits)


def test_a_whole_fused_layer_by_its_name() -> None:
    tuned = attach(toy("gpt2"), [IA3(targets=("c_attn", "down"))])  # PEFT's choice for GPT-2
    assert {tuple(p.shape) for p in tuned.delta_parameters().values()} == {(48,), (64,)}


def test_the_input_of_a_part_is_refused() -> None:
    with pytest.raises(TargetError, match="share one input"):
        attach(toy("gpt2"), [IA3(feedforward=("k", "down"))])


def test_other_inputs_by_role() -> None:
    tuned = attach(toy("bert"), [IA3(targets=("k", "v", "output.dense"), feedforward=("o", "down"))])  # PEFT's choice for BERT
    assert {(site.role, delta.feedforward) for site, delta in tuned.pairs()} == {
        ("k", False), ("v", False), ("o", True), ("down", True)}
