"""The face of a frozen affine layer that is stored in another form than as one matrix.

    y = x W^T + b,    W (d_out, d_in) is decoded, or multiplied factor by factor, when it is needed and never kept
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class CompactLinear(nn.Module, ABC):
    """A frozen affine layer in another form, seen as (d_out, d_in) whatever layer it stands for (Linear or Conv1D).

    `bias` is a plain parameter or None. `dtype` is the type that the layer's weight counts as: what `weight.dtype` says and what
    `Module.to` changes; what the form itself stores keeps its types. Products are in the type of their input.
    """

    bias: nn.Parameter | None

    def __init__(self, d_in: int, d_out: int, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.d_in, self.d_out, self.dtype = d_in, d_out, dtype
        self.transposed = False  # whether the layer that it stands for stores its weight as (d_in, d_out), as Conv1D does
        trains = bias is not None and bias.requires_grad
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=trains))

    @property
    def in_features(self) -> int:
        """As nn.Linear calls d_in."""
        return self.d_in

    @property
    def out_features(self) -> int:
        """As nn.Linear calls d_out."""
        return self.d_out

    @property
    def weight(self) -> Tensor:
        """The shape and type of the weight of the layer that this one stands for, on the meta device: it has no values.

        For code that reads these. Values are in `dequantised`; code that would compute with this tensor fails instead of decoding
        the layer each time.
        """
        shape = (self.d_in, self.d_out) if self.transposed else (self.d_out, self.d_in)
        return torch.empty(shape, dtype=self.dtype, device="meta")

    @abstractmethod
    def dequantised(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (d_out, d_in) as one new tensor; in the layer's own `dtype` by default."""

    @abstractmethod
    def form(self) -> dict[str, Any]:
        """JSON-ready: the kind of layer and the sizes of all its tensors, from which `empty_layer` makes it again."""

    @abstractmethod
    def again(self, weight: Tensor, bias: Tensor | None) -> CompactLinear:
        """A layer of the same form that is nearest to another weight (d_out, d_in), with this bias."""

    def elements(self) -> int:
        """Numbers that the layer's weight counts for: those of the dense weight that it stands for."""
        return self.d_in * self.d_out

    def product(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out), bias included, in the dtype of x."""
        return self.multiplied(x, self.bias)

    def multiplied(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`product` with a bias (d_out,) of any type in the place of the own one."""
        return functional.linear(x, self.dequantised(x.dtype), None if bias is None else bias.to(x.dtype))

    def product_transposed(self, g: Tensor) -> Tensor:
        """g (..., d_out) -> (..., d_in): the gradient of `product` with respect to its input."""
        return g @ self.dequantised(g.dtype)

    def replaced(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The layer's output with another weight (d_out, d_in) or another bias in the place of its own; they carry gradients."""
        bias = self.bias if bias is None else bias
        if weight is None:
            return _Frozen.apply(x, bias, self)
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out). Gradients reach x and the bias; nothing that grows with x is kept for them."""
        device = x.device.type
        if torch.is_autocast_enabled(device):  # what autocast does for a plain linear layer
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return self.replaced(x, None, None)

    def extra_repr(self) -> str:
        """Sizes and bytes."""
        return f"d_in={self.d_in}, d_out={self.d_out}, bias={self.bias is not None}, bytes={self.stored_bytes()}"

    def stored_bytes(self) -> int:
        """Bytes of everything that stands for the weight; the bias is not counted."""
        own = [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]
        return sum(tensor.numel() * tensor.element_size() for name, tensor in own if name != "bias")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompactLinear:
        """Moves to another device or type, as of every module: scales and codes keep their types, as they are no weights."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None and buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


class _Frozen(torch.autograd.Function):
    """The product with the frozen weight: it is decoded again in backward instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: CompactLinear) -> Tensor:
        ctx.layer = layer
        ctx.bias_dtype = None if bias is None else bias.dtype
        return layer.multiplied(x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g = grads[0]
        grad_bias = g.reshape(-1, g.shape[-1]).sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return ctx.layer.product_transposed(g) if ctx.needs_input_grad[0] else None, grad_bias, None
