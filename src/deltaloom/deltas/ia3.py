"""(IA)3: learned vectors scale keys, values and the inner activations of the mlp.

    y = l * (W x + b)          at keys and values: the layer's output is scaled
    y = W (l * x) + b          at the mlp's last layer: its input is scaled

Liu et al. 2022 (arXiv 2205.05638). All vectors start at one, so nothing changes at birth. Keys and values that a fused
layer computes (GPT-2's c_attn, Phi-3's qkv_proj) are its parts `k` and `v`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltaloom.compact.face import affine_shape, is_conv1d
from deltaloom.deltas._peft import PEFT_COMMON, by_suffix, peft_targets, refuse_fields, whole_sites
from deltaloom.deltas.base import AttachContext, Attachment, Delta, Method, PeftPart, PeftReading
from deltaloom.errors import CheckpointError, RefusedError, TargetError
from deltaloom.sites import Kind, Site

PEFT_TYPE = "IA3"
PEFT_NAME = ".ia3_l"  # (d_out, 1), or (1, d_in) where the input is scaled


class Ia3Delta(Delta):
    """A vector at one site: (d_in,) if it scales the input (`feedforward`), else (d_out,)."""

    def __init__(self, width: int, feedforward: bool) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.ones(width))
        self.feedforward = feedforward

    def before(self, x: Tensor) -> Tensor:
        """The scaled input, if it is this that is scaled."""
        return x * self.vector.to(x.dtype) if self.feedforward else x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The scaled output, if it is this that is scaled."""
        return y if self.feedforward else y * self.vector.to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Columns scaled for the input; rows and bias scaled for the output."""
        vector = self.vector.detach().to(weight.dtype)
        if self.feedforward:
            return weight * vector, bias
        return weight * vector[:, None], None if bias is None else bias * vector


class IA3(Method):
    """Infused adapter by inhibiting and amplifying inner activations."""

    name: ClassVar[str] = "ia3"
    kinds: ClassVar[tuple[Kind, ...]] = ("linear",)
    peft_types: ClassVar[tuple[str, ...]] = (PEFT_TYPE,)

    targets: str | tuple[str, ...] = ("k", "v", "down")
    """Which linear layers; keys, values and the mlp's last layer by default."""
    feedforward: tuple[str, ...] = ("down",)
    """Roles whose input is scaled; the output of all others."""

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """One vector for each site.

        Raises:
            TargetError: the input of a fused layer's part is to be scaled; its other parts read the same input.
        """
        fused = [site.name for site in sites if site.part is not None and site.role in self.feedforward]
        if fused:
            raise TargetError("the parts of a fused layer share one input, which cannot be scaled for one of them", got=fused[0],
                              hint="Take these roles out of `feedforward`.", problems=fused)
        return Attachment({site: self._delta(site) for site in sites})

    def _delta(self, site: Site) -> Ia3Delta:
        feedforward = site.role in self.feedforward
        return Ia3Delta(site.d_in if feedforward else site.d_out, feedforward)

    def to_peft(self, attachment: Attachment, model: nn.Module) -> PeftPart:
        """PEFT's (IA)3; the parts of a fused layer become one vector, with ones for the other parts."""
        tensors: dict[str, Tensor] = {}
        feedforward = []
        for site, delta in attachment.deltas.items():
            if not isinstance(delta, Ia3Delta):
                raise RefusedError("this is no (IA)3 vector", got=type(delta).__name__)
            name, vector = site.path + PEFT_NAME, delta.vector.detach().float()
            if delta.feedforward:
                feedforward.append(site.path)
                tensors[name] = vector[None, :]
            elif site.part is None:
                tensors[name] = vector[:, None]
            else:
                whole = tensors.setdefault(name, torch.ones(affine_shape(model.get_submodule(site.path))[0], 1))
                whole[slice(*site.part), 0] = vector
        paths = [name.removesuffix(PEFT_NAME) for name in tensors]
        config = {"peft_type": PEFT_TYPE, "target_modules": paths, "feedforward_modules": feedforward, "init_ia3_weights": True,
                  "fan_in_fan_out": all(is_conv1d(model.get_submodule(path)) for path in paths)}
        return PeftPart(config, tensors)

    @classmethod
    def from_peft(cls, adapter: PeftPart, model: nn.Module) -> PeftReading | None:
        """PEFT's (IA)3; what a vector scales is in its shape."""
        refuse_fields(adapter.config, PEFT_COMMON | {"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"})
        vectors = by_suffix(adapter.tensors, PEFT_NAME)
        if not vectors:
            raise CheckpointError("the adapter holds no ia3_l")
        sites = whole_sites(model, cls, vectors)
        wrong = [f"{path}: {tuple(vector.shape)}" for path, vector in vectors.items()
                 if tuple(vector.shape) not in ((sites[path].d_out, 1), (1, sites[path].d_in))]
        if wrong:
            raise CheckpointError("vectors of the adapter do not fit their layers", problems=wrong[:20])
        inner = {sites[path].role for path, vector in vectors.items() if vector.shape[0] == 1}
        if inner & {sites[path].role for path, vector in vectors.items() if vector.shape[0] != 1}:
            raise RefusedError("the adapter scales the input of some layers and the output of others of one role",
                               got=", ".join(sorted(inner)))
        method = cls(targets=peft_targets(adapter.config, cls, model, vectors), feedforward=tuple(sorted(inner)))
        state = {sites[path].name: {"vector": vector.flatten()} for path, vector in vectors.items()}
        return PeftReading(method, state, frozenset(path + PEFT_NAME for path in vectors))
