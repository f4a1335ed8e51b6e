"""Full fine-tuning of the chosen layers: trainable tensors take the place of the layer's own.

    y = layer(x) with its weight, bias, ... replaced by trainable copies

On all layers this is full fine-tuning, step for step; on some of them it is layer-wise fine-tuning, and on a new head it is
how heads train. Copies are float32 whatever the storage of the model, so that small updates are not lost in 16 bits (master
weights: Micikevicius et al. 2018, arXiv 1710.03740). Tensors that the model ties stay tied: they share one copy, if the
targets name all the layers concerned; a layer named alone is untied from the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from deltaloom.compact.face import compact_layers, own_tensors, stores_transposed
from deltaloom.deltas._peft import modules_ending, whole_sites
from deltaloom.deltas.base import AttachContext, Attachment, Delta, Method, PeftPart, PeftReading, master_copy
from deltaloom.errors import CheckpointError, RefusedError, TargetError
from deltaloom.sites import Kind, Site

PEFT_FIELD = "modules_to_save"


class FullDelta(Delta):
    """Trainable tensors of one layer, by their names in the layer; `transposed`: the layer stores its weight as (d_in, d_out)."""

    def __init__(self, tensors: dict[str, nn.Parameter], transposed: bool) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, tensor)
        self.names = tuple(tensors)
        self.transposed = transposed

    def override(self) -> dict[str, Tensor]:
        """All the tensors."""
        return {name: getattr(self, name) for name in self.names}

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The tensors themselves."""
        own = {name: tensor.detach().to(weight.dtype) for name, tensor in self.override().items()}
        others = sorted(own.keys() - {"weight", "bias"})
        if others:
            raise RefusedError("these tensors are not a layer's weight and bias", got=", ".join(others),
                               hint="Keep the delta next to the model.")
        new = own.get("weight", weight)
        return new.T if self.transposed and "weight" in own else new, own.get("bias", bias)


class Full(Method):
    """Full fine-tuning of the layers that the targets name."""

    name: ClassVar[str] = "full"
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "embedding", "norm", "tensors")
    peft_fields: ClassVar[tuple[str, ...]] = (PEFT_FIELD,)

    targets: str | tuple[str, ...] = "all"
    """Which layers. What the model itself never trains (a fixed position table) stays fixed under `all`."""

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """Copies of each layer's tensors; a tensor that several layers share is copied once.

        Raises:
            TargetError: a part of a fused layer, or a layer that has nothing to train.
        """
        parts = [site.name for site in sites if site.part is not None]
        if parts:
            raise TargetError("a part of a fused layer cannot be replaced on its own", got=parts[0],
                              hint="Name the whole layer.", problems=parts)
        copies: dict[object, nn.Parameter] = {}
        deltas: dict[Site, Delta] = {}
        idle = []
        for site in sites:
            layer = context.layer(site)
            tensors = {name: tensor for name, tensor in own_tensors(layer).items()
                       if tensor.is_floating_point() and f"{site.path}.{name}" not in context.fixed}
            if not tensors:
                idle.append(site.name)
                continue
            # a tensor that was decoded for this is nobody else's; only parameters are shared
            keys = {name: id(tensor) if isinstance(tensor, nn.Parameter) else (site.path, name)
                    for name, tensor in tensors.items()}
            for name, tensor in tensors.items():
                copies.setdefault(keys[name], master_copy(tensor))
            deltas[site] = FullDelta({name: copies[key] for name, key in keys.items()}, stores_transposed(layer))
        if not deltas or (idle and self.targets != "all"):
            raise TargetError("these layers have no tensor that can train", got=len(idle), problems=idle)
        return Attachment(deltas)

    def to_peft(self, attachment: Attachment, model: nn.Module) -> PeftPart:
        """PEFT's modules_to_save, which are whole layers."""
        tensors = {f"{site.path}.{key}": tensor.detach()
                   for site, delta in attachment.deltas.items() for key, tensor in delta.override().items()}
        return PeftPart({PEFT_FIELD: [site.path for site in attachment.deltas]}, tensors)

    @classmethod
    def from_peft(cls, adapter: PeftPart, model: nn.Module) -> PeftReading | None:
        """PEFT's modules_to_save; layers that are as the model has them (PEFT saves heads in any case) need no delta."""
        roots = modules_ending(model, adapter.config.get(PEFT_FIELD))
        own: dict[str, Tensor] = model.state_dict(keep_vars=True)
        buffers = dict(model.named_buffers())
        own |= {f"{path}.weight": own_tensors(layer)["weight"] for path, layer in compact_layers(model).items()
                if any(f"{path}.".startswith(f"{root}.") for root in roots)}
        names = [name for name in adapter.tensors if any(name.startswith(f"{root}.") for root in roots)]
        wrong = [f"{name} {tuple(adapter.tensors[name].shape)}" for name in names
                 if name not in own or own[name].shape != adapter.tensors[name].shape]
        if wrong:
            raise CheckpointError("saved modules of the adapter do not fit this model", problems=wrong[:20])
        changed = {name for name in names if not own[name].detach().cpu().equal(adapter.tensors[name].to(own[name].dtype))}
        fixed = sorted(name for name in changed if name in buffers)
        if fixed:
            raise RefusedError("the adapter changes buffers of the model, which no delta does", problems=fixed[:20])
        paths = {name.rpartition(".")[0]: name for name in changed}
        sites = whole_sites(model, cls, [path for path, _ in model.named_modules() if path in paths])
        state = {site.name: {key: adapter.tensors[f"{path}.{key}"]
                             for key, _ in own_tensors(model.get_submodule(path)).items()
                             if f"{path}.{key}" in adapter.tensors} for path, site in sites.items()}
        return PeftReading(cls(targets=tuple(sites) or "all"), state, frozenset(names))
