"""A frozen affine layer whose weight is stored by a codec, optionally with a low-rank correction beside it.

    W ~ decode(codes) + left right,    left (d_out, r), right (r, d_in)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltaloom.compact.base import CompactLinear
from deltaloom.compact.codecs.base import Codec, codec_record
from deltaloom.errors import RefusedError


class QuantisedLinear(CompactLinear):
    """A layer with a quantised weight. Its tensors are buffers by the codec's names; `left` and `right` are the correction."""

    left: Tensor | None
    right: Tensor | None

    def __init__(self, d_in: int, d_out: int, codec: Codec, *, bias: Tensor | None = None, correction: int = 0,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "meta") -> None:
        """An empty layer: its values are still to be loaded."""
        super().__init__(d_in, d_out, bias, dtype)
        self.codec, self.correction = codec, correction
        for name, (shape, kind) in codec.shapes(d_out, d_in).items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        self.left = self.right = None
        if correction:
            self.left = nn.Parameter(torch.empty(d_out, correction, dtype=dtype, device=device), requires_grad=False)
            self.right = nn.Parameter(torch.empty(correction, d_in, dtype=dtype, device=device), requires_grad=False)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None, codec: Codec,
                    correction: tuple[Tensor, Tensor] | None = None) -> QuantisedLinear:
        """The layer of weight (d_out, d_in); `correction` is (left (d_out, r), right (r, d_in)), added to the decoded weight.

        Raises:
            RefusedError: the weight cannot be encoded, or the correction does not fit it.
        """
        return cls.from_tensors(codec.encode(weight), weight.shape[1], weight.shape[0], bias, codec, weight.dtype, correction)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], d_in: int, d_out: int, bias: Tensor | None, codec: Codec,
                     dtype: torch.dtype, correction: tuple[Tensor, Tensor] | None = None) -> QuantisedLinear:
        """The layer of tensors that the codec gave (or packed) for a weight of `dtype`; they are kept, not copied.

        Raises:
            RefusedError: tensors of other shapes than the codec's, or a correction that does not fit.
        """
        rank = 0 if correction is None else int(correction[0].shape[-1])
        layer = cls(d_in, d_out, codec, bias=bias, correction=rank, dtype=dtype)
        given: dict[str, Tensor] = dict(tensors)
        if correction is not None:
            given |= {"left": correction[0].detach().to(dtype), "right": correction[1].detach().to(dtype)}
        own = layer._stored()
        problems = [f"{name}: {_told(given.get(name))}, wanted {_told(tensor)}" for name, tensor in own.items()
                    if name not in given or given[name].shape != tensor.shape or given[name].dtype != tensor.dtype]
        problems += [f"{name}: not a tensor of this layer" for name in given if name not in own]
        if problems:
            raise RefusedError("these tensors are not those of a quantised layer", problems=problems)
        for name, tensor in given.items():
            if name in ("left", "right"):
                layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                layer.register_buffer(name, tensor)
        return layer

    def dequantised(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight with the correction added, rounded once."""
        dtype = dtype or self.dtype
        if self.left is None or self.right is None:
            return self._decoded(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return self._decoded(wide).addmm_(self.left.to(wide), self.right.to(wide)).to(dtype)

    def multiplied(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product with the decoded weight, plus the correction through its rank."""
        y = nn.functional.linear(x, self._decoded(x.dtype), None if bias is None else bias.to(x.dtype))
        if self.left is not None and self.right is not None:
            y += (x @ self.right.to(x.dtype).T) @ self.left.to(x.dtype).T
        return y

    def product_transposed(self, g: Tensor) -> Tensor:
        """g (..., d_out) -> (..., d_in)"""
        back = g @ self._decoded(g.dtype)
        if self.left is not None and self.right is not None:
            back += (g @ self.left.to(g.dtype)) @ self.right.to(g.dtype)
        return back

    def form(self) -> dict[str, Any]:
        """The codec with its settings, and the rank of the correction."""
        return {"form": "quantised", "d_in": self.d_in, "d_out": self.d_out, "bias": self.bias is not None,
                "transposed": self.transposed, **codec_record(self.codec), "correction": self.correction}

    def again(self, weight: Tensor, bias: Tensor | None) -> QuantisedLinear:
        """The same codec on what the correction, which stays, leaves of the weight."""
        rest, correction = weight, None
        if self.left is not None and self.right is not None:
            correction = (self.left, self.right)
            rest = weight - self.left.to(weight.dtype) @ self.right.to(weight.dtype)
        made = self.from_tensors(self.codec.encode(rest), self.d_in, self.d_out, bias, self.codec, self.dtype, correction)
        made.transposed = self.transposed
        return made.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, bytes and the codec."""
        return f"{super().extra_repr()}, codec={self.codec.name}, correction={self.correction}"

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        return self.codec.decode(self._buffers, self.d_out, self.d_in, dtype)  # type: ignore[arg-type]

    def _stored(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.state_dict(keep_vars=True).items() if name != "bias"}


def _told(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
