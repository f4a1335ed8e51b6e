from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from deltaloom.deltas.full import Full
from deltaloom.deltas.lora import LoRA
from deltaloom.deltas.norms import Norms
from deltaloom.errors import RefusedError, TargetError
from deltaloom.tuned import attach
from tests.contract.cases import assert_near, logits
from tests.toys import VOCABULARY, toy, toy_batch


def tied_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3)
    return LlamaForCausalLM(config).eval().to(dtype)


def model_of(layout: str, dtype: torch.dtype) -> nn.Module:
    return tied_llama(dtype) if layout == "llama" else toy(layout, dtype=dtype)


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert", "t5", "vit", "bart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam], ids=["sgd", "adam"])
def test_is_full_fine_tuning_step_for_step(layout: str, dtype: torch.dtype, optimizer: type) -> None:
    plain = model_of(layout, dtype)
    tuned = attach(model_of(layout, dtype), [Full()])
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in toy_batch(layout).items()}
    assert tuned.counts()[0] == sum(p.numel() for p in plain.parameters())
    # Adam divides by the gradient's size: where that is rounding noise (biases of keys), a large epsilon keeps it small
    options = {"lr": 0.05} if optimizer is torch.optim.SGD else {"lr": 0.01, "eps": 1e-3}
    ours = optimizer(tuned.delta_parameters().values(), **options)
    theirs = optimizer(plain.parameters(), **options)
    for _ in range(5):
        losses = []
        for model, stepper in ((tuned, ours), (plain, theirs)):
            stepper.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            stepper.step()
            losses.append(loss.detach())
        assert_near(losses[0], losses[1], "full")
    with torch.no_grad():
        for site, delta in tuned.pairs():
            for key, tensor in delta.override().items():
                assert_near(tensor, getattr(plain.get_submodule(site.path), key), "full")
    assert tuned.never_ran() == []


def test_tied_tensors_share_one_copy_which_both_layers_use() -> None:
    tuned = attach(tied_llama(), [Full()])
    copies = {site.path: delta for site, delta in tuned.pairs()}
    assert copies["model.embed_tokens"].weight is copies["lm_head"].weight
    with torch.no_grad():
        copies["lm_head"].weight.zero_()
    assert logits(tuned, "llama").abs().max() == 0
    tuned.double()
    assert copies["model.embed_tokens"].weight is copies["lm_head"].weight


def test_one_side_of_a_tie_alone_leaves_the_other_as_it_is() -> None:
    tuned = attach(tied_llama(), [Full(targets="lm_head")])
    with torch.no_grad():
        tuned.pairs()[0][1].weight.zero_()
    assert tuned.model.model.embed_tokens.weight.abs().max() > 0


def test_what_the_model_never_trains_stays_fixed() -> None:
    model = toy("gpt2")
    model.transformer.wpe.weight.requires_grad_(False)
    assert "transformer.wpe" not in {site.path for site, _ in attach(model, [Full()]).pairs()}
    model = toy("gpt2").requires_grad_(False)  # a model that was frozen as a whole says nothing about single tensors
    assert "transformer.wpe" in {site.path for site, _ in attach(model, [Full()]).pairs()}
    model = toy("gpt2")
    model.transformer.wpe.weight.requires_grad_(False)
    with pytest.raises(TargetError, match="wpe"):
        attach(model, [Full(targets="wpe")])


def test_parts_are_refused() -> None:
    with pytest.raises(TargetError, match="whole layer"):
        attach(toy("gpt2"), [Full(targets="q")])


def test_two_replacements_of_one_tensor_are_refused() -> None:
    model = toy("llama")
    with pytest.raises(RefusedError, match=r"model\.norm\.weight"):
        attach(model, [Full(), Norms()])
    attach(model, [Full(targets=("all", "!*norm*")), Norms()])


def test_a_head_that_a_method_replaces_gets_no_second_copy() -> None:
    tuned = attach(toy("bert"), [LoRA(rank=2)], heads=[Full(targets="classifier")])
    assert tuned.counts()[1] == 3 * 16 + 3
    tuned = attach(toy("bert"), [Full()], heads=[Full(targets="classifier")])
    assert tuned.counts() == (sum(p.numel() for p in toy("bert").parameters()), 0)


def test_small_updates_are_not_lost_in_16_bits() -> None:
    tuned = attach(toy("llama", dtype=torch.bfloat16), [Full(targets="down_proj")])
    (key, parameter), *_ = tuned.delta_parameters().items()
    start = parameter.detach().clone()
    for _ in range(100):
        with torch.no_grad():
            parameter += 1e-5
    torch.testing.assert_close(parameter.detach(), start + 1e-3, atol=1e-5, rtol=0)
    assert parameter.dtype == torch.float32, key
