from __future__ import annotations

import pytest
import torch
from torch import nn

from deltaloom.errors import CheckpointError, RefusedError
from deltaloom.train.optimizer import (
    clip_gradients,
    divide_gradients,
    gradient_norm,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_learning_rate,
)
from deltaloom.train.settings import TrainSettings


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in
             {"a": (3, 4), "b": (5,), "c": (2, 2, 2), "d": ()}.items()}
    for parameter in found.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 3
    return found


@pytest.mark.parametrize("most", [0.1, 1.0, 1e6])
def test_clipping_is_torch_clip_grad_norm(most):
    ours, theirs = list(parameters().values()), list(parameters().values())
    norm = gradient_norm(ours)
    clip_gradients(ours, most, norm)
    expected = nn.utils.clip_grad_norm_(theirs, most)
    assert torch.equal(norm, expected)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))


def test_gradients_are_divided_and_missing_ones_left():
    own = parameters()
    before = own["a"].grad.clone()
    own["b"].grad = None
    divide_gradients(list(own.values()), torch.tensor(4))
    assert torch.equal(own["a"].grad, before / 4)
    assert own["b"].grad is None


def test_only_matrices_decay():
    own = parameters()
    before = {name: p.detach().clone() for name, p in own.items()}
    for p in own.values():
        p.grad = torch.zeros_like(p)
    optimizer = make_optimizer(own, TrainSettings(weight_decay=0.5, learning_rate=0.1))
    optimizer.step()
    assert {name for name in own if not torch.equal(own[name], before[name])} == {"a", "c"}


@pytest.mark.parametrize("settings", [TrainSettings(learning_rate=0.1), TrainSettings(optimizer="sgd", learning_rate=0.1)])
def test_a_step_is_that_of_the_plain_formula(settings):
    own, plain = parameters(), parameters()
    optimizer = make_optimizer(own, settings)
    set_learning_rate(optimizer, 0.05)
    optimizer.step()
    for name, parameter in plain.items():
        g = parameter.grad
        change = g if settings.optimizer == "sgd" else g / (g.abs() + 1e-8)  # both moments corrected: g and g squared
        torch.testing.assert_close(own[name].detach(), (parameter - 0.05 * change).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_state_by_name_goes_round_bit_for_bit(name):
    settings = TrainSettings(optimizer=name)
    one, other = parameters(), parameters()
    first, second = make_optimizer(one, settings), make_optimizer(other, settings)
    for p, q in zip(one.values(), other.values(), strict=True):
        q.grad = p.grad.clone()
    first.step()
    with torch.no_grad():
        for p, q in zip(one.values(), other.values(), strict=True):
            q.copy_(p)
    load_optimizer_state(second, other, optimizer_state(first, one))
    first.step()
    second.step()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_state_of_other_parameters_is_refused():
    own = parameters()
    optimizer = make_optimizer(own, TrainSettings())
    with pytest.raises(CheckpointError, match="unexpected: z"):
        load_optimizer_state(optimizer, own, {"z": {"step": torch.ones(())}})


def test_nothing_to_train_is_refused():
    with pytest.raises(RefusedError, match="no trainable parameter"):
        make_optimizer({}, TrainSettings())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_state_goes_back_to_parameters_of_any_memory_layout(optimizer):
    torch.manual_seed(0)
    start, gradients = torch.randn(6, 4), torch.randn(5, 4, 6)

    def stepped(parameter, made, steps):
        for gradient in gradients[steps]:
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
            made.step()

    def fresh():
        parameter = torch.nn.Parameter(start.clone().T)  # its memory goes by columns
        return parameter, make_optimizer({"w": parameter}, TrainSettings(optimizer=optimizer))

    whole, made = fresh()
    stepped(whole, made, slice(0, 5))
    cut, made = fresh()
    stepped(cut, made, slice(0, 3))
    saved = {name: {key: value.contiguous() for key, value in state.items() if isinstance(value, torch.Tensor)}
             for name, state in optimizer_state(made, {"w": cut}).items()}
    resumed, made = fresh()
    with torch.no_grad():
        resumed.copy_(cut)
    load_optimizer_state(made, {"w": resumed}, saved)
    stepped(resumed, made, slice(3, 5))
    assert torch.equal(whole, resumed)
