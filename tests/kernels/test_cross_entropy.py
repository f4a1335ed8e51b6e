import pytest
import torch
from torch.nn import functional as F

from deltaloom.kernels import cross_entropy
from deltaloom.kernels.cross_entropy import linear_cross_entropy, token_losses


def inputs(rows=7, width=5, classes=11, dtype=torch.float64, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(classes, width, generator=generator, dtype=dtype)
    extra = torch.randn(classes, generator=generator, dtype=dtype) if bias else None
    return hidden, weight, extra, torch.randint(0, classes, (rows,), generator=generator)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 300, 10**9])
def test_losses_and_gradients_equal_the_plain_way(monkeypatch, bias, chunk):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk)
    hidden, weight, extra, labels = inputs(bias=bias)
    plain = F.cross_entropy(F.linear(hidden, weight, extra), labels, reduction="none")
    losses = token_losses(hidden, weight, extra, labels)
    torch.testing.assert_close(losses, plain)
    scale = torch.arange(1.0, 8.0, dtype=torch.float64)
    found = torch.autograd.grad((losses * scale).sum(), hidden)
    torch.testing.assert_close(found, torch.autograd.grad((plain * scale).sum(), hidden))
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, extra, labels), plain.sum())


def test_gradcheck():
    hidden, weight, extra, labels = inputs()
    assert torch.autograd.gradcheck(lambda x: token_losses(x, weight, extra, labels), hidden)


@pytest.mark.parametrize("trains", ["weight", "bias"])
def test_a_head_that_trains_gets_its_gradient(trains):
    hidden, weight, extra, labels = inputs()
    parameter = (weight if trains == "weight" else extra).requires_grad_()
    found = torch.autograd.grad(linear_cross_entropy(hidden, weight, extra, labels), [hidden, parameter])
    plain = torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight, extra), labels, reduction="sum"), [hidden, parameter])
    torch.testing.assert_close(found, plain)


def test_large_scores_stay_finite_and_bf16_is_near_its_own_plain_way():
    hidden, weight, _, labels = inputs(dtype=torch.float32, bias=False)
    assert torch.isfinite(token_losses(hidden * 1e4, weight, None, labels)).all()
    low = hidden.detach().bfloat16().requires_grad_()
    losses = token_losses(low, weight.bfloat16(), None, labels)
    assert losses.dtype == torch.float32
    exact = F.cross_entropy(F.linear(low.detach().float(), weight.bfloat16().float()), labels, reduction="none")
    torch.testing.assert_close(losses, exact, rtol=0.05, atol=0.05)
    losses.sum().backward()
    assert low.grad.dtype == torch.bfloat16


def test_no_positions_and_no_gradient():
    hidden, weight, extra, labels = inputs()
    assert token_losses(hidden[:0], weight, extra, labels[:0]).shape == (0,)
    linear_cross_entropy(hidden[:0], weight, extra, labels[:0]).backward()
    assert not token_losses(hidden.detach(), weight, extra, labels).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(token_losses(hidden, weight.requires_grad_(), extra, labels),
                                   F.cross_entropy(F.linear(hidden, weight, extra), labels, reduction="none"))


def test_under_autocast_it_computes_as_a_linear_layer_does():
    hidden, weight, _, labels = inputs(dtype=torch.float32, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        losses = token_losses(hidden, weight, None, labels)
        plain = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")
    torch.testing.assert_close(losses, plain)
    losses.sum().backward()
    assert hidden.grad.dtype == torch.float32
