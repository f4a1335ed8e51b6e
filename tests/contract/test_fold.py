"""The law of folding: a layer with a delta equals the affine layer with the folded weight and bias, computed the dumb way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from deltaloom.deltas.base import Delta
from deltaloom.errors import RefusedError
from deltaloom.sites import Site
from deltaloom.tuned.adapted import Adapted, wrappers
from tests.contract.cases import Case, all_cases, assert_near, inside_layers, perturb

CASES = all_cases(("llama", "gpt2", "bert", "t5", "gemma", "phi3"))


def folded(layer: nn.Module, site: Site, delta: Delta) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the whole layer with one delta; rows of a part are put back into the whole."""
    weight = layer.weight.T if isinstance(layer, (Conv1D, nn.Embedding)) else layer.weight
    bias = getattr(layer, "bias", None)
    if site.part is None:
        return delta.fold(weight, bias)
    start, stop = site.part
    new, new_bias = delta.fold(weight[start:stop], None if bias is None else bias[start:stop])
    whole = torch.cat((weight[:start], new, weight[stop:]))
    if new_bias is None:
        return whole, bias
    old = torch.zeros(len(weight)).to(weight) if bias is None else bias
    return whole, torch.cat((old[:start], new_bias, old[stop:]))


def affine(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the layer computes with this weight (d_out, d_in) and bias."""
    if isinstance(layer, nn.Embedding):
        return functional_call(layer, {"weight": weight.T}, (x,))  # Gemma's scales what it looks up
    if isinstance(layer, (nn.Linear, Conv1D)):
        return functional.linear(x, weight, bias)
    if getattr(layer, "bias", None) is not None:
        return functional_call(layer, {"weight": weight, "bias": bias}, (x,))
    y = functional_call(layer, {"weight": weight}, (x,))
    return y if bias is None else y + bias


def an_input(layer: nn.Module, site: Site) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, (2, 3))
    return torch.randn(2, 3, site.d_in, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_layer_with_delta_equals_folded_layer(case: Case) -> None:
    tuned = case.tuned().to(torch.float64)
    perturb(tuned)
    if not inside_layers(tuned):
        pytest.skip("rows in front change no layer")
    seen = 0
    with torch.no_grad():
        for wrapper in wrappers(tuned.model):
            for site, delta in wrapper.items("default"):
                single = Adapted(wrapper.base, site.path, tuned.routing)
                single.add("default", site, delta)
                try:
                    weight, bias = folded(wrapper.base, site, delta)
                except RefusedError as error:
                    assert len(str(error)) > 20
                    continue
                if site.kind != "tensors":
                    x = an_input(wrapper.base, site)
                    assert_near(single(x), affine(wrapper.base, x, weight, bias), f"fold:{case.name}")
                    seen += 1
    if not seen:
        pytest.skip("folding is refused, with a reason")


def test_square_embeddings_fold_the_right_way_round() -> None:
    """A vocabulary as large as the width, where a wrong orientation would not show in the shapes."""
    from deltaloom.deltas.base import AttachContext
    from deltaloom.deltas.lora import LoRA

    model = nn.Sequential(nn.Embedding(6, 6)).double()
    method = LoRA(rank=2, targets="all")
    (site,) = method.sites(model)
    (delta,) = method.attach([site], AttachContext(model)).deltas.values()
    delta.double()
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.normal_()
        weight, _ = delta.fold(model[0].weight.T, None)
        ids = torch.arange(6)
        assert_near(delta.after(ids, model(ids)), weight.T[ids], "fold")
