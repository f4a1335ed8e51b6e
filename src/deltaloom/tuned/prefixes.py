"""Prefix deltas at the attention modules of a tuned model: which lane's keys and values each row sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaloom.attention import PrefixRows, PrefixSlot, install, prefix_slot, set_prefix_slot
from deltaloom.deltas.base import PrefixDelta
from deltaloom.errors import RefusedError
from deltaloom.sites import Site
from deltaloom.tuned.adapted import Adapted, Tap
from deltaloom.tuned.routing import Routing


class RoutedPrefix(PrefixSlot):
    """The prefixes of one attention module by lane; several of one lane follow one another."""

    def __init__(self, routing: Routing, replaced: str) -> None:
        self.routing = routing
        self.replaced = replaced  # the attention function that the model used before its first prefix
        self.lanes: dict[str, list[PrefixDelta]] = {}
        self.taps: dict[str, Tap] = {}  # where a lane's gates read the attention module's input; one for each lane that has some

    def rows(self, count: int) -> PrefixRows | None:
        """The keys and values that each row's lane has; rows without any see padding, masked."""
        groups = self.routing.groups(count)
        found = [(rows, self._of_lane(str(lane), rows)) for lane, rows in groups if lane in self.lanes]
        for tap in self.taps.values():
            tap.value = None  # of lanes that are not in use
        length = max((own.keys.shape[0] for _, own in found), default=0)
        if not length:  # none, or one of which nothing is left
            return None
        if found[0][0] is None:
            return found[0][1]
        first = found[0][1].keys
        keys, values = (first.new_zeros(count, length, *first.shape[1:]) for _ in range(2))
        visible, spared = (torch.zeros(count, length, dtype=torch.bool, device=first.device) for _ in range(2))
        for rows, own in found:
            keys[rows, :own.keys.shape[0]] = own.keys
            values[rows, :own.keys.shape[0]] = own.values
            visible[rows, :own.keys.shape[0]] = True
            if own.spared is not None:
                spared[rows, :own.keys.shape[0]] = own.spared
        sparing = any(own.spared is not None for _, own in found)
        return PrefixRows(keys, values, visible, _gates_of_rows(found, count, length), spared if sparing else None)

    def _of_lane(self, lane: str, rows: Tensor | None) -> PrefixRows:
        deltas = self.lanes[lane]
        pairs = [delta.keys_values() for delta in deltas]
        keys, values = pairs[0] if len(pairs) == 1 else (torch.cat([each[side] for each in pairs]) for side in (0, 1))
        spared = _spared(deltas, pairs)
        if lane not in self.taps:
            return PrefixRows(keys, values, spared=spared)
        x = self.taps[lane].take()
        with self.routing.layout.narrowed(rows):
            logs = [delta.log_gate(x if rows is None else x[rows.to(x.device)]) for delta in deltas]
        return PrefixRows(keys, values, None, _by_key(logs, [len(own) for own, _ in pairs], keys), spared)


def _by_key(logs: Sequence[Tensor | None], lengths: Sequence[int], like: Tensor) -> Tensor:
    """The gates of a lane's prefixes as one (rows, 1 | T, P): each is None, one number for its keys, or one for each of them."""
    given = [each if each.ndim == 3 else each[..., None] for each in logs if each is not None]
    rows, time = max(each.shape[0] for each in given), max(each.shape[1] for each in given)
    whole = iter(given)
    columns = [like.new_zeros(1, 1, 1) if each is None else next(whole) for each in logs]
    return torch.cat([each.expand(rows, time, length) for each, length in zip(columns, lengths, strict=True)], -1)


def _spared(deltas: Sequence[PrefixDelta], pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
    """(1, P): which of a lane's keys the first token does not see; None where it sees all."""
    if not any(delta.spares_first for delta in deltas):
        return None
    return torch.cat([torch.full(keys.shape[:1], delta.spares_first, device=keys.device)
                      for delta, (keys, _) in zip(deltas, pairs, strict=True)])[None]


def _gates_of_rows(found: Sequence[tuple[Tensor | None, PrefixRows]], count: int, length: int) -> Tensor | None:
    """The gates of all lanes' prefixes as one (count, 1 | T, length); zero where a lane has none."""
    gated = [(rows, own.log_gate) for rows, own in found if own.log_gate is not None]
    if not gated:
        return None
    logs = gated[0][1].new_zeros(count, max(each.shape[1] for _, each in gated), length)
    for rows, each in gated:
        logs[rows, :, :each.shape[2]] = each
    return logs


def install_prefix(model: nn.Module, lane: str, site: Site, delta: PrefixDelta, routing: Routing, tap: Tap | None = None) -> None:
    """Let the attention module at `site` see the delta's keys and values whenever the routing names the lane.

    `tap` is where a gated prefix reads the module's input.

    Raises:
        RefusedError: the model does not use transformers' attention interface.
    """
    if not isinstance(model, PreTrainedModel):
        raise RefusedError("a prefix needs a model of transformers", got=type(model).__name__)
    module = _attention(model, site)
    slot = prefix_slot(module)
    if not isinstance(slot, RoutedPrefix):
        others = _slots(model)
        slot = RoutedPrefix(routing, others[0].replaced if others else install(model))
        set_prefix_slot(module, slot)
    slot.lanes.setdefault(lane, []).append(delta)
    if tap is not None:
        slot.taps[lane] = tap


def uninstall_prefix(model: nn.Module, lane: str, site: Site) -> None:
    """Forget a lane's prefixes at an attention module; with the last one goes deltaloom's attention function."""
    module = _attention(model, site)
    slot = prefix_slot(module)
    if not isinstance(slot, RoutedPrefix):
        return
    slot.lanes.pop(lane, None)
    slot.taps.pop(lane, None)
    if not slot.lanes:
        set_prefix_slot(module, None)
        if isinstance(model, PreTrainedModel) and not _slots(model):
            model.set_attn_implementation(slot.replaced)


def has_prefixes(model: nn.Module) -> bool:
    """Whether attention modules of a model see prefixes."""
    return bool(_slots(model))


def taps_of_prefixes(model: nn.Module) -> set[int]:
    """The ids of the taps that prefixes read."""
    return {id(tap) for slot in _slots(model) for tap in slot.taps.values()}


def _attention(model: nn.Module, site: Site) -> nn.Module:
    """The attention module itself, which a gate's wrapper may stand around."""
    module = model.get_submodule(site.path)
    return module.base if isinstance(module, Adapted) else module


def _slots(model: nn.Module) -> list[RoutedPrefix]:
    found = (prefix_slot(module) for module in model.modules())
    return [slot for slot in found if isinstance(slot, RoutedPrefix)]
