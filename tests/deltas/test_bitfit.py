from __future__ import annotations

import pytest
import torch

from deltaloom.deltas.bitfit import BitFit
from deltaloom.errors import TargetError
from deltaloom.tuned import attach
from tests.contract.cases import perturb
from tests.toys import toy, toy_batch


@pytest.mark.parametrize("layout", ["bert", "gpt2", "vit", "roberta"])
def test_equals_the_model_with_other_biases(layout: str) -> None:
    tuned = attach(toy(layout), [BitFit()])
    perturb(tuned)
    oracle = toy(layout)
    with torch.no_grad():
        for site, delta in tuned.pairs():
            oracle.get_submodule(site.path).bias += delta.bias
        torch.testing.assert_close(tuned(**toy_batch(layout)).logits, oracle(**toy_batch(layout)).logits)


def test_default_is_every_bias_but_the_heads() -> None:
    model = toy("bert")
    own = {name.removesuffix(".bias") for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert {site.path for site in BitFit().sites(model)} == own - {"classifier"}


@pytest.mark.parametrize("layout", ["llama", "t5", "gemma"])
def test_a_model_without_biases_gets_new_ones_at_the_linears_of_its_blocks(layout: str) -> None:
    sites = BitFit().sites(toy(layout))
    assert sites
    assert all(site.kind == "linear" and site.layer is not None and not site.has_bias for site in sites)
    with pytest.raises(TargetError):
        BitFit(new=False).sites(toy(layout))


def test_a_target_without_biases_is_not_dropped_silently() -> None:
    model = toy("llama")
    model.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.ones(16))  # as in Qwen2: some have, some have not
    assert [site.path for site in BitFit().sites(model)] == ["model.layers.0.self_attn.q_proj"]
    with pytest.raises(TargetError, match="o_proj"):
        BitFit(targets=("q_proj", "o_proj")).sites(model)
    assert len(BitFit(targets=("q_proj", "o_proj"), new=True).sites(model)) == 4


def test_a_part_of_a_fused_layer() -> None:
    tuned = attach(toy("gpt2"), [BitFit(targets="v")])
    perturb(tuned)
    oracle = toy("gpt2")
    with torch.no_grad():
        for site, delta in tuned.pairs():
            assert site.part == (32, 48)
            oracle.get_submodule(site.path).bias[32:48] += delta.bias
        torch.testing.assert_close(tuned(**toy_batch("gpt2")).logits, oracle(**toy_batch("gpt2")).logits)


def test_trained_bias_switched_off_is_the_base_bit_for_bit() -> None:
    base = toy("bert")(**toy_batch("bert")).logits
    tuned = attach(toy("bert"), [BitFit()])
    perturb(tuned)
    assert not torch.equal(tuned(**toy_batch("bert")).logits, base)
    with tuned.use(None):
        assert torch.equal(tuned(**toy_batch("bert")).logits, base)
