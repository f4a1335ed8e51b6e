"""Importance against a loop over single numbers, in float64."""

import pytest
import torch
from torch import nn

from deltaloom.allocation import SENSITIVITIES, Importance

BETA1, BETA2 = 0.7, 0.6


def parameters(seed=0):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in ((3, 1), (3, 4), (3, 2))]


def move(values, seed):
    """New values and gradients; the last parameter has none in one step."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for index, value in enumerate(values):
            value.add_(torch.randn(value.shape, generator=generator, dtype=torch.float64))
            gradient = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.grad = None if index == 2 and seed == 3 else gradient


@pytest.mark.parametrize("name", ["weight-gradient", "gradient"])
def test_averages_are_those_of_a_loop_over_numbers(name):
    values = parameters()
    importance = Importance(values, name, BETA1, BETA2)
    smooth, unsure = ({} for _ in range(2))
    for step in range(1, 7):
        move(values, step)
        importance.observe()
        for index, value in enumerate(values):
            for place in range(value.numel()):
                gradient = 0.0 if value.grad is None else value.grad.flatten()[place].item()
                weight = value.detach().flatten()[place].item()
                found = abs(weight * gradient) if name == "weight-gradient" else abs(gradient)
                key = index, place
                smooth[key] = BETA1 * smooth.get(key, 0.0) + (1 - BETA1) * found
                unsure[key] = BETA2 * unsure.get(key, 0.0) + (1 - BETA2) * abs(found - smooth[key])
        scores = importance.scores()
        assert [score.shape for score in scores] == [value.shape for value in values]
        for (index, place), value in smooth.items():
            assert scores[index].flatten()[place].item() == pytest.approx(value * unsure[index, place], rel=1e-12)


def test_gradients_and_parameters_stay_as_they_are():
    values = parameters()
    move(values, 1)
    before = [(value.detach().clone(), value.grad.clone()) for value in values]
    for name in SENSITIVITIES:
        importance = Importance(values, name, BETA1, BETA2)
        importance.observe()
        assert all(score.sum() > 0 and not score.requires_grad for score in importance.scores())
    assert all(torch.equal(value, old) and torch.equal(value.grad, grad)
               for value, (old, grad) in zip(values, before, strict=True))


def test_a_state_is_taken_back_and_is_a_copy():
    values = parameters()
    one, other = (Importance(values, "gradient", BETA1, BETA2) for _ in range(2))
    for step in (1, 2):
        move(values, step)
        one.observe()
    other.load_state_dict(one.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(one.scores(), other.scores(), strict=True))
    held = [tensor.clone() for tensor in one.smoothness]
    move(values, 4)
    other.observe()
    assert all(torch.equal(a, b) for a, b in zip(one.smoothness, held, strict=True))
    one.observe()
    assert all(torch.equal(a, b) for a, b in zip(one.scores(), other.scores(), strict=True))
