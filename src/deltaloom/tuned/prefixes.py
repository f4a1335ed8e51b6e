"""Prefix deltas at the attention modules of a tuned model: which lane's keys and values each row sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaloom.attention import PrefixRows, PrefixSlot, install, prefix_slot, set_prefix_slot
from deltaloom.deltas.base import PrefixDelta
from deltaloom.errors import RefusedError
from deltaloom.sites import Site
from deltaloom.tuned.adapted import Routing


class RoutedPrefix(PrefixSlot):
    """The prefixes of one attention module by lane; several of one lane follow one another."""

    def __init__(self, routing: Routing, replaced: str) -> None:
        self.routing = routing
        self.replaced = replaced  # the attention function that the model used before its first prefix
        self.lanes: dict[str, list[PrefixDelta]] = {}

    def rows(self, count: int) -> PrefixRows | None:
        """The keys and values that each row's lane has; rows without any see padding, masked."""
        groups = self.routing.groups(count)
        found = [(rows, *self._keys_values(lane)) for lane, rows in groups if lane in self.lanes]
        if not found:
            return None
        sparing = any(delta.spares_first for deltas in self.lanes.values() for delta in deltas)
        if found[0][0] is None:
            return PrefixRows(found[0][1], found[0][2], spared=found[0][3][None] if sparing else None)
        length = max(keys.shape[0] for _, keys, _, _ in found)
        first = found[0][1]
        keys, values = (first.new_zeros(count, length, *first.shape[1:]) for _ in range(2))
        visible, spared = (torch.zeros(count, length, dtype=torch.bool, device=first.device) for _ in range(2))
        for rows, own_keys, own_values, own_spared in found:
            keys[rows, :own_keys.shape[0]] = own_keys
            values[rows, :own_keys.shape[0]] = own_values
            visible[rows, :own_keys.shape[0]] = True
            spared[rows, :own_keys.shape[0]] = own_spared
        return PrefixRows(keys, values, visible, spared=spared if sparing else None)

    def _keys_values(self, lane: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """A lane's keys, values, and which of them the first token does not see."""
        deltas = self.lanes[str(lane)]
        pairs = [delta.keys_values() for delta in deltas]
        spared = [torch.full(keys.shape[:1], delta.spares_first, device=keys.device)
                  for delta, (keys, _) in zip(deltas, pairs, strict=True)]
        if len(pairs) == 1:
            return *pairs[0], spared[0]
        return torch.cat([keys for keys, _ in pairs]), torch.cat([values for _, values in pairs]), torch.cat(spared)


def install_prefix(model: nn.Module, lane: str, site: Site, delta: PrefixDelta, routing: Routing) -> None:
    """Let the attention module at `site` see the delta's keys and values whenever the routing names the lane.

    Raises:
        RefusedError: the model does not use transformers' attention interface.
    """
    if not isinstance(model, PreTrainedModel):
        raise RefusedError("a prefix needs a model of transformers", got=type(model).__name__)
    module = model.get_submodule(site.path)
    slot = prefix_slot(module)
    if not isinstance(slot, RoutedPrefix):
        others = _slots(model)
        slot = RoutedPrefix(routing, others[0].replaced if others else install(model))
        set_prefix_slot(module, slot)
    slot.lanes.setdefault(lane, []).append(delta)


def uninstall_prefix(model: nn.Module, lane: str, site: Site) -> None:
    """Forget a lane's prefixes at an attention module; with the last one goes deltaloom's attention function."""
    module = model.get_submodule(site.path)
    slot = prefix_slot(module)
    if not isinstance(slot, RoutedPrefix):
        return
    slot.lanes.pop(lane, None)
    if not slot.lanes:
        set_prefix_slot(module, None)
        if isinstance(model, PreTrainedModel) and not _slots(model):
            model.set_attn_implementation(slot.replaced)


def has_prefixes(model: nn.Module) -> bool:
    """Whether attention modules of a model see prefixes."""
    return bool(_slots(model))


def _slots(model: nn.Module) -> list[RoutedPrefix]:
    found = (prefix_slot(module) for module in model.modules())
    return [slot for slot in found if isinstance(slot, RoutedPrefix)]
