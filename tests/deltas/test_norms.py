from __future__ import annotations

import pytest
import torch

from deltaloom.deltas.norms import Norms
from deltaloom.errors import TargetError
from deltaloom.tuned import attach
from tests.toys import toy, toy_batch


@pytest.mark.parametrize("layout", ["llama", "gemma", "bert", "t5", "qwen3", "vit"])
def test_trains_exactly_the_norms_as_full_training_of_them_would(layout: str) -> None:
    """Gemma's norm multiplies by 1 + weight: the copies take the place of the weight itself, so nothing is special."""
    tuned, plain = attach(toy(layout), [Norms()]), toy(layout)
    names = [name for name, _ in plain.named_parameters() if "norm" in name.lower()]
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in names)
    trainable = [p for p in plain.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == tuned.counts()[0]
    ours = torch.optim.SGD(tuned.delta_parameters().values(), lr=0.1)
    theirs = torch.optim.SGD(trainable, lr=0.1)
    batch = toy_batch(layout)
    for _ in range(3):
        for model, optimizer in ((tuned, ours), (plain, theirs)):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    for site, delta in tuned.pairs():
        for key, tensor in delta.override().items():
            torch.testing.assert_close(tensor, getattr(plain.get_submodule(site.path), key))
    with torch.no_grad():
        torch.testing.assert_close(tuned(**batch).logits, plain(**batch).logits)


def test_targets() -> None:
    assert [site.path for site in Norms(targets="input_layernorm", layers="1").sites(toy("llama"))] == [
        "model.layers.1.input_layernorm"]
    with pytest.raises(TargetError, match="q_proj"):
        Norms(targets="q_proj").sites(toy("llama"))


def test_copies_are_full_precision() -> None:
    tuned = attach(toy("llama", dtype=torch.bfloat16), [Norms()])
    assert {p.dtype for p in tuned.delta_parameters().values()} == {torch.float32}
