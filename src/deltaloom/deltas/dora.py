"""DoRA: weight decomposition into a magnitude and a low-rank change of the direction.

    y = m / ||W + s B A|| * (W x + s B A x) + b        (norm of each row, detached from the gradient as in the paper)

Reparameterisation-based delta tuning. m starts at the rows' norms, A Gaussian and B at zero: nothing changes at birth.
W + s B A is never formed: ||W + s B A||^2 = ||W||^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B (A A^T)) * B).
Liu et al. 2024 (arXiv 2402.09353).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltaloom.compact.face import affine_weight, is_conv1d
from deltaloom.deltas._peft import by_suffix, peft_targets, whole_sites
from deltaloom.deltas._ranked import PEFT_TYPE, RankedMethod, check_peft_ranks, read_peft_settings, write_peft_config
from deltaloom.deltas.base import AttachContext, Attachment, Delta, PeftPart, PeftReading
from deltaloom.errors import CheckpointError, RefusedError
from deltaloom.kernels.dropout import dropout
from deltaloom.sites import Site

SMALLEST = 1e-12  # of a norm, so that a row of zeros divides by something
NAMES = {"down": (".lora_A.weight",), "up": (".lora_B.weight",),
         "magnitude": (".lora_magnitude_vector", ".lora_magnitude_vector.weight")}  # the second as PEFT wrote it at first


class DoraDelta(Delta):
    """A magnitude (d_out,) and a pair `down` (rank, d_in), `up` (d_out, rank) at one affine layer."""

    squares: Tensor

    def __init__(self, layer: nn.Module, part: tuple[int, int] | None, down: Tensor, up: Tensor, scale: float,
                 dropout: float) -> None:
        super().__init__()
        self._frozen = (layer,)  # in a tuple: seen, but no submodule and not in the state
        self._rows = slice(*part) if part else slice(None)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.scale = scale
        self.dropout = dropout
        squares = self._weight().double().square().sum(1)
        self.register_buffer("squares", squares, persistent=False)
        self.magnitude = nn.Parameter(squares.sqrt().clamp_min(SMALLEST).float())

    def _weight(self) -> Tensor:
        return affine_weight(self._frozen[0]).detach()[self._rows]

    def _bias(self) -> Tensor | None:
        bias = self._frozen[0].bias
        return bias.detach()[self._rows] if isinstance(bias, Tensor) else None

    @torch.no_grad()
    def norms(self) -> Tensor:
        """The norm of each row of W + s B A, (d_out,); the product with W is made in W's dtype, the sums in float64."""
        weight = self._weight()
        cross = ((weight @ self.down.to(weight.dtype).T).to(self.up.dtype) * self.up).sum(1, dtype=torch.float64)
        square = ((self.up @ (self.down @ self.down.T)) * self.up).sum(1, dtype=torch.float64)
        norms = (self.squares + 2 * self.scale * cross + self.scale ** 2 * square).clamp_min(SMALLEST ** 2).sqrt()
        return norms.to(self.magnitude.dtype)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y, its part without bias scaled by magnitude / norm, plus the scaled low-rank product."""
        more = (self.magnitude / self.norms() - 1.0)  # exactly 0 at birth: magnitude and norm come from one formula
        bias = self._bias()
        linear = y if bias is None else y - bias.to(y.dtype)
        x = dropout(x, self.dropout, self.training)
        low = ((x @ self.down.to(y.dtype).T) * self.scale) @ self.up.to(y.dtype).T
        return y + (linear * more.to(y.dtype) + low * (more + 1.0).to(y.dtype))

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows of weight + s B A times magnitude / norm; a bias that other deltas added is scaled with them."""
        dtype = weight.dtype
        change = self.scale * (self.up.detach().to(dtype) @ self.down.detach().to(dtype))
        norms = (self._weight().to(dtype) + change).norm(dim=1).clamp_min(SMALLEST)
        ratio = self.magnitude.detach().to(dtype) / norms
        own = self._bias()
        if bias is not None:
            frozen = torch.zeros_like(bias) if own is None else own.to(dtype)
            bias = (bias - frozen) * ratio + frozen
        return (weight + change) * ratio[:, None], bias


class DoRA(RankedMethod):
    """Weight-decomposed low-rank adaptation."""

    name: ClassVar[str] = "dora"
    peft_types: ClassVar[tuple[str, ...]] = (PEFT_TYPE,)
    asked_as: ClassVar[Mapping[str, str]] = {
        "qdora": "That is a combination: write base: {quantise: nf4} and deltas: [{method: dora}] in the run file."}

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """One magnitude and one pair for each site."""
        deltas: dict[Site, Delta] = {}
        for site, (rank, scale) in self.ranks(sites).items():
            down = torch.randn(rank, site.d_in, generator=context.generator) / math.sqrt(site.d_in)
            deltas[site] = DoraDelta(context.layer(site), site.part, down, torch.zeros(site.d_out, rank), scale, self.dropout)
        return Attachment(deltas)

    def to_peft(self, attachment: Attachment, model: nn.Module) -> PeftPart:
        """PEFT's LoRA with `use_dora`."""
        parts = [site.name for site in attachment.deltas if site.part is not None]
        if parts:
            raise RefusedError("PEFT has no DoRA for parts of a fused layer", problems=parts[:20], hint="Keep the native format.")
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        scales: dict[str, float] = {}
        for site, delta in attachment.deltas.items():
            if isinstance(delta, DoraDelta):
                ranks[site.path], scales[site.path] = delta.down.shape[0], delta.scale
                tensors |= {site.path + names[0]: delta.get_parameter(key).detach() for key, names in NAMES.items()}
        transposed = all(is_conv1d(model.get_submodule(path)) for path in ranks)
        return PeftPart(write_peft_config(self, ranks, scales, transposed=transposed, dora=True), tensors)

    @classmethod
    def from_peft(cls, adapter: PeftPart, model: nn.Module) -> PeftReading | None:
        """PEFT's LoRA with `use_dora`."""
        if not adapter.config.get("use_dora"):
            return None
        found = {key: by_suffix(adapter.tensors, *names) for key, names in NAMES.items()}
        paths = set(found["down"])
        alone = sorted(set().union(*found.values()) ^ set.intersection(*(set(tensors) for tensors in found.values())))
        if alone or not paths:
            raise CheckpointError("lora_A, lora_B and lora_magnitude_vector do not come together", problems=alone[:20])
        sites = whole_sites(model, cls, found["down"])
        ranks = {path: tensor.shape[0] if tensor.ndim == 2 else 0 for path, tensor in found["down"].items()}
        settings = read_peft_settings(adapter.config, ranks)
        method = cls.parse(settings | {"targets": peft_targets(adapter.config, cls, model, found["down"])}, "adapter_config.json")
        check_peft_ranks(method, sites, ranks)
        used = {path + name for path in paths for names in NAMES.values() for name in names if path + name in adapter.tensors}
        state = {sites[path].name: {key: tensors[path] for key, tensors in found.items()} for path in found["down"]}
        return PeftReading(method, state, frozenset(used))
