"""Cross-entropy of a linear head without ever holding all logits.

loss_i = logsumexp_v(h_i . W_v + b_v) - (h_i . W_y + b_y). Positions go through the head in chunks; the gradient with respect to
the hidden states, (softmax - onehot) W, is formed in the same pass, so that backward only scales it and no logits wait for it.
Products run in the dtype of the hidden states, the softmax in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK_BYTES = 64_000_000  # of logits held at once


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """The sum over positions of `token_losses`, a scalar."""
    return token_losses(hidden, weight, bias, labels).sum()


def token_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Cross-entropy in nats of each position, (n,), in fp32 (fp64 for fp64 inputs).

    hidden (n, d), weight (V, d), bias (V,) or None, labels (n,) in 0..V-1. A head that trains gets its gradient too, by
    holding all logits.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # as autocast does for a linear layer
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            return F.cross_entropy(F.linear(hidden, weight, bias).to(_softmax_dtype(hidden)), labels, reduction="none")
        return _TokenLosses.apply(hidden, weight, bias, labels)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        dtype = _softmax_dtype(hidden)
        losses = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = max(1, CHUNK_BYTES // (len(weight) * dtype.itemsize))
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            scores = F.linear(hidden[part], weight, bias).to(dtype)
            place = labels[part, None]
            peak, own = scores.amax(1, keepdim=True), scores.gather(1, place)
            total = scores.sub_(peak).exp_().sum(1, keepdim=True)
            losses[part] = (total.log() + peak - own).squeeze(1)
            if gradient is not None:
                scores.div_(total).scatter_add_(1, place, torch.full_like(own, -1.0))
                torch.mm(scores.to(hidden.dtype), weight, out=gradient[part])
        ctx.gradient = gradient
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient = ctx.gradient
        return None if gradient is None else gradient * grads[0][:, None].to(gradient.dtype), None, None, None


def _softmax_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
