"""Dropout from a seed: share, mean, gradient, reproducibility."""

from __future__ import annotations

import pytest
import torch

from deltaloom.kernels.dropout import SeededDropout, dropout, multiplier


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_share_and_mean_are_those_of_dropout(dtype: torch.dtype, p: float) -> None:
    found = multiplier(torch.empty(300, 1001, dtype=dtype), p, seed=7)
    assert found.dtype == dtype
    zeros = float((found == 0).double().mean())
    assert abs(zeros - p) < 4 * (p * (1 - p) / found.numel()) ** 0.5 + 1e-4
    kept = found[found != 0]
    assert bool((kept == kept[0]).all())
    assert float(kept[0]) == pytest.approx(1 / (1 - p), rel=4e-3 if dtype == torch.bfloat16 else 1e-4)


def test_entries_are_independent_along_rows_and_columns() -> None:
    found = (multiplier(torch.empty(512, 512), 0.5, seed=1) != 0).double() - 0.5
    for shift in (1, 2, 3, 4, 8, 512):
        flat = found.flatten()
        assert abs(float((flat[:-shift] * flat[shift:]).mean())) < 0.25 * 4 / 512


@pytest.mark.parametrize("shape", [(), (1,), (3,), (0, 5), (2, 3, 7)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    assert multiplier(torch.empty(shape), 0.3, seed=3).shape == shape


def test_backward_sees_the_mask_of_forward_and_a_seed_repeats_it() -> None:
    x = torch.randn(40, 50, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    y = dropout(x, 0.4)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.detach(), y.detach())
    torch.manual_seed(5)
    assert torch.equal(dropout(x, 0.4), y)
    assert not torch.equal(dropout(x, 0.4), y)


def test_off_is_off() -> None:
    x = torch.randn(4, 4)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x
    assert torch.equal(dropout(x, 1.0), torch.zeros(4, 4))
    assert SeededDropout(0.5).eval()(x) is x


def test_nothing_is_kept_for_backward() -> None:
    kept: list[torch.Tensor] = []
    x = torch.randn(64, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dropout(x, 0.1)
    assert kept == []
