"""The fused low-rank function against the plain formula: values, gradients in float64, what it keeps for backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from deltaloom.deltas.lora import LoRA
from deltaloom.kernels.low_rank import low_rank_linear
from deltaloom.tuned import attach
from deltaloom.tuned.adapted import DenseAffine
from tests.toys import toy, toy_batch

SHAPES = [(2, 3), (5,), (), (0,), (2, 0), (1, 1)]


def problem(rows: tuple[int, ...], rank: int, conv: bool = False, dtype: torch.dtype = torch.float64,
            bias: bool = True) -> tuple[DenseAffine, list[Tensor]]:
    torch.manual_seed(0)
    layer = Conv1D(5, 4) if conv else nn.Linear(4, 5, bias=bias)
    layer = layer.to(dtype).requires_grad_(False)
    with torch.no_grad():
        layer.weight.normal_()
    sizes = [(*rows, 4), (rank, 4), (rank,), (5, rank)]
    return DenseAffine(layer), [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


def plain(affine: DenseAffine, x: Tensor, down: Tensor, scale: Tensor, up: Tensor) -> Tensor:
    return affine.layer(x) + ((x @ down.T) * scale) @ up.T


@pytest.mark.parametrize("rows", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [0, 1, 3, 7])
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
def test_values_and_gradients_equal_the_plain_formula(rows: tuple[int, ...], rank: int, conv: bool) -> None:
    affine, inputs = problem(rows, rank, conv)
    twins = [t.detach().clone().requires_grad_() for t in inputs]
    y, expected = low_rank_linear(affine, *inputs), plain(affine, *twins)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    for ours, theirs in zip(inputs, twins, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad if theirs.grad is not None else torch.zeros_like(theirs))


@pytest.mark.parametrize("rows", [(2, 3), (5,), (0,)], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("frozen", [(), (0,), (2,), (0, 2)], ids=str)
def test_gradcheck(rows: tuple[int, ...], rank: int, dropout: float, frozen: tuple[int, ...]) -> None:
    affine, inputs = problem(rows, rank)
    for index in frozen:
        inputs[index].requires_grad_(False)

    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same dropout at each call
        return low_rank_linear(affine, *tensors, dropout)

    assert torch.autograd.gradcheck(function, inputs)


def test_inputs_that_are_no_contiguous_rows() -> None:
    affine, inputs = problem((2, 3), 2)
    turned = torch.randn(3, 2, 4, dtype=torch.float64).transpose(0, 1).requires_grad_()
    inputs[0] = turned
    y = low_rank_linear(affine, *inputs)
    torch.testing.assert_close(y, plain(affine, *inputs))
    y.transpose(0, 1).contiguous().sum().backward()
    low_rank_linear(affine, *inputs).backward(torch.randn(3, 2, 5, dtype=torch.float64).transpose(0, 1))
    expanded = torch.randn(1, 4, dtype=torch.float64).expand(6, 4)
    torch.testing.assert_close(low_rank_linear(affine, expanded, *inputs[1:]), plain(affine, expanded, *inputs[1:]))


def test_dropout_hides_inputs_from_the_product_only_and_keeps_its_mean() -> None:
    affine, inputs = problem((2000, 10), 2)
    with torch.no_grad():
        x, down, scale, up = inputs
        x.fill_(1.0)
        torch.manual_seed(0)
        low = low_rank_linear(affine, *inputs, 0.25) - affine.product(x)
        whole = ((x @ down.T) * scale) @ up.T
    torch.testing.assert_close(low.mean((0, 1)), whole.mean((0, 1)), atol=0.05, rtol=0.02)
    assert low.std(0).max() > 0.01
    torch.manual_seed(5)
    once = low_rank_linear(affine, *inputs, 0.25)
    torch.manual_seed(5)
    assert torch.equal(once, low_rank_linear(affine, *inputs, 0.25))


def test_half_precision_inputs_with_full_precision_factors() -> None:
    affine, inputs = problem((4, 3), 2, dtype=torch.float32)
    affine.layer.to(torch.bfloat16)
    x = inputs[0].detach().to(torch.bfloat16).requires_grad_()
    y = low_rank_linear(affine, x, *inputs[1:])
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert {t.grad.dtype for t in inputs[1:]} == {torch.float32}


def kept_for_backward(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(**inputs)
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nothing_but_the_input_and_parameters_waits_for_backward(dtype: torch.dtype, dropout: float) -> None:
    affine, inputs = problem((8, 4), 2, dtype=torch.float32)
    affine.layer.to(dtype)
    x = inputs[0].detach().to(dtype).requires_grad_()
    own = {t.data_ptr() for t in (x, *inputs[1:])}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        low_rank_linear(affine, x, *inputs[1:], dropout)
    assert {t.data_ptr() for t in kept} <= own


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert"])
def test_a_whole_model_with_lora_keeps_no_more_than_the_frozen_one(layout: str) -> None:
    """Apart from the inputs of its layers, which the frozen model need not keep, and the parameters."""
    model = toy(layout)
    inputs = toy_batch(layout, rows=8, time=16, labels=False)
    x: dict[int, int] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x[args[0].data_ptr()] = args[0].untyped_storage().nbytes()

    def size(tensors: list[Tensor]) -> int:
        own = {p.data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}
        return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.data_ptr() not in own}.values())

    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    model.requires_grad_(False)
    frozen = size(kept_for_backward(model, inputs))
    hook.remove()
    tuned = attach(model, [LoRA(rank=2)])
    for site, _ in tuned.pairs():
        model.get_submodule(site.path).register_forward_pre_hook(note)
    assert size(kept_for_backward(tuned, inputs)) <= frozen + sum(x.values())
