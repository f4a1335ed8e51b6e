"""Deltas that leave nothing out reach what full fine-tuning reaches: LoRA of full rank, biases, norms, embeddings, head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaloom.compact.face import affine_weight
from deltaloom.deltas.bitfit import BitFit
from deltaloom.deltas.full import Full
from deltaloom.deltas.lora import LoRA
from deltaloom.deltas.norms import Norms
from deltaloom.tuned import Tuned, attach
from tests.toys import toy, toy_batch

WIDEST = 24


def everything(layout: str, dtype: torch.dtype = torch.float32) -> Tuned:
    methods = [LoRA(rank=WIDEST, alpha=WIDEST, targets=("all-linear", "pooler") if layout == "bert" else "all-linear"),
               BitFit(targets=("all", "!re:.*[Nn]orm.*|.*ln_.*"), new=False), Norms(),
               Full(targets="re:.*embeddings|.*embed_tokens|.*wte|.*wpe|lm_head|classifier")]
    if layout == "llama":
        methods.pop(1)  # it has no biases
    return attach(toy(layout, dtype=dtype), methods)


def steps(model: torch.nn.Module, parameters: list[Tensor], batch: dict[str, Tensor], count: int, lr: float) -> float:
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for _ in range(count):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(model(**batch).loss)


@pytest.mark.parametrize("layout", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
def test_the_fully_tuned_model_is_one_of_those_that_the_deltas_can_be(layout: str, dtype: torch.dtype, bound: float) -> None:
    base, fully = toy(layout, dtype=dtype), toy(layout, dtype=dtype)
    batch = toy_batch(layout)
    steps(fully, list(fully.parameters()), batch, 20, 1e-2)
    tuned = everything(layout, dtype).to(dtype)
    with torch.no_grad():
        for site, delta in tuned.pairs():
            new, old = fully.get_submodule(site.path), base.get_submodule(site.path)
            if delta.override():
                for key, tensor in delta.override().items():
                    tensor.copy_(getattr(new, key))
            elif hasattr(delta, "bias"):
                delta.bias.copy_(new.bias - old.bias)
            else:  # B A = the difference of the weights, from its singular value decomposition
                left, sizes, right = torch.linalg.svd(affine_weight(new) - affine_weight(old), full_matrices=False)
                delta.down.zero_()
                delta.down[:len(sizes)] = right
                delta.up[:, :len(sizes)] = left * sizes
        got, expected, before = tuned(**batch).logits, fully(**batch).logits, base(**batch).logits
    assert (expected - before).abs().max() > 0.1
    assert (got - expected).abs().max() < bound * (1 + expected.abs().max())


@pytest.mark.parametrize("layout", ["bert", "llama"])
def test_training_reaches_the_same_loss(layout: str) -> None:
    batch = toy_batch(layout, rows=12)
    fully, tuned = toy(layout), everything(layout)
    with torch.no_grad():
        start = float(fully(**batch).loss)
    full = steps(fully, list(fully.parameters()), batch, 150, 1e-2)
    ours = steps(tuned, list(tuned.delta_parameters().values()), batch, 150, 1e-2)
    assert full < 0.1 * start
    assert ours < 0.1 * start
    assert tuned.never_ran() == []
