"""Oracle for methods whose matrices share bases: each matrix's change by loops in float64, and a model with changed weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from deltaloom.deltas.base import Method
from deltaloom.sites import Site
from deltaloom.tuned import Tuned, attach
from tests.contract.cases import perturb
from tests.toys import toy, toy_batch

State = Mapping[str, Tensor]


def square_bert() -> nn.Module:
    """As in the paper: q, k, v, o of one size, and an mlp four times as wide; twelve slices a block."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_labels=3,
        pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3)).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "square-bert": square_bert, **{name: lambda name=name: toy(name) for name in ("bert", "gpt2", "llama", "t5")}}


def changed(name: str, method: Method) -> tuple[nn.Module, Tuned]:
    """An untouched model and a tuned one with random deltas, both in float64."""
    plain = MODELS[name]()
    tuned = attach(copy.deepcopy(plain), [method])
    perturb(tuned, size=0.3)
    return plain.double(), tuned.double()


def block(up: Tensor, core: Tensor, down: Tensor) -> Tensor:
    """U S V^T, one term after the other."""
    total = torch.zeros(len(up), down.shape[1], dtype=torch.float64)
    for a in range(core.shape[0]):
        for b in range(core.shape[1]):
            total += core[a, b] * torch.outer(up[:, a], down[b])
    return total


def assert_is(tuned: Tuned, plain: nn.Module, layout: str, matrix: Callable[[Site, State], Tensor]) -> None:
    """Factors and the model's output are those of the weights that have `matrix` of each site added to them."""
    state = {key.removeprefix("0:"): tensor for key, tensor in tuned.delta_state().items()}
    with torch.no_grad():
        for site, delta in tuned.pairs():
            expected = matrix(site, state)
            assert expected.abs().max() > 0.01
            torch.testing.assert_close(delta.matrix(), expected, rtol=0, atol=1e-12)
            layer = plain.get_submodule(site.path)
            rows = slice(*site.part) if site.part else slice(None)
            (layer.weight.T if isinstance(layer, Conv1D) else layer.weight)[rows] += expected
        batch = toy_batch(layout, labels=layout == "t5")
        torch.testing.assert_close(tuned(**batch).logits, plain(**batch).logits, rtol=0, atol=1e-10)
