"""Removing neurons and heads so that a plain configuration of transformers says what is left.

A unit is what the configuration counts: a neuron of the feed-forward layer (a row of up and gate, a column of down), or a
head of keys and values with all the query heads that read it (rows of q, k, v, columns of o). Every block keeps as many, as a
configuration has one number for all of them. Which ones is each block's own choice, except where a table with a column for each
head is read by all blocks of a stack (T5): there it is the stack's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltaloom.architectures import WIDTHS, Widths, split_path
from deltaloom.compact import CompactLinear
from deltaloom.errors import RefusedError, listed
from deltaloom.sites import Site, all_sites


@dataclass(frozen=True)
class Rows:
    """The outputs of a layer that make units: `width` consecutive rows from `start` on for each unit."""

    path: str
    width: int
    start: int = 0


@dataclass(frozen=True)
class Units:
    """The units of one sub-layer of one block."""

    leave: str                 # path of the layer that reads the units and writes back to the hidden states: names them
    count: int
    width: int                 # columns of `leave` for each unit
    makers: tuple[Rows, ...]   # what makes them
    together: str              # the same name where the same units have to be kept in several blocks
    tables: tuple[str, ...] = ()   # embeddings with a column for each unit

    def columns(self, kept: Tensor) -> Tensor:
        """The columns of `leave` that belong to units."""
        return spread(kept, self.width)


@dataclass
class Cut:
    """What to keep: units by sub-layer, and the configuration's new numbers."""

    kept: dict[str, Tensor] = field(default_factory=dict)    # path of `leave` -> indices, ascending
    numbers: dict[str, int] = field(default_factory=dict)


def spread(units: Tensor, width: int, start: int = 0) -> Tensor:
    """Indices of the `width` consecutive rows of each unit."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten() + start


def widths_of(model: PreTrainedModel) -> Widths:
    """The row of the table.

    Raises:
        RefusedError: the family has none.
    """
    found = WIDTHS.get(model.config.model_type)
    if found is None:
        raise RefusedError("which widths the configuration of this family can state is not known", got=model.config.model_type,
                           legal=list(WIDTHS), hint="A row in the table WIDTHS says it.")
    return found


def neurons_of(model: PreTrainedModel) -> list[Units]:
    """The neurons of every block.

    Raises:
        RefusedError: blocks with several feed-forward layers, or with compressed ones.
    """
    widths_of(model)
    blocks = _by_module(model, ("up", "gate", "gate_up", "down"), lambda site: "", "neurons")
    found = []
    for sites in blocks:
        down = [site for site in sites if site.role == "down"]
        makers = [site for site in sites if site.role != "down"]
        parts = [Rows(site.path, 1, start) for site in makers
                 for start in ((0, site.d_out // 2) if site.role == "gate_up" else (0,))]
        count = down[0].d_in if len(down) == 1 else 0
        if not parts or any(site.d_out != count * (2 if site.role == "gate_up" else 1) for site in makers):
            raise RefusedError("a block whose feed-forward layer is not one of up, gate and down", got=sites[0].path)
        found.append(Units(down[0].path, count, 1, tuple(parts), down[0].path))
    return found


def heads_of(model: PreTrainedModel) -> list[Units]:
    """The heads of keys and values of every attention, each with the query heads that read it.

    Raises:
        RefusedError: the configuration cannot state another number of heads, or as `neurons_of`.
    """
    widths = widths_of(model)
    if widths.heads is None:
        raise RefusedError("the heads of this family are as wide as their number says, so that none can be removed",
                           got=model.config.model_type, hint="Remove neurons instead.")
    heads = int(getattr(model.config, widths.heads))
    groups = int(getattr(model.config, widths.groups) or heads) if widths.groups else heads
    found = []
    for sites in _by_module(model, ("q", "k", "v", "o", "qkv"), lambda site: site.path.rpartition(".")[0], "heads"):
        by_role = {site.role: site for site in sites}
        leave = by_role.get("o")
        if leave is None or len(by_role) != len(sites) or (not {"q", "k", "v"} <= set(by_role) and "qkv" not in by_role):
            raise RefusedError("an attention that is not made of q, k, v and o", got=sites[0].path)
        size = leave.d_in // heads
        query = size * heads // groups
        if "qkv" in by_role:
            path, starts = by_role["qkv"].path, (0, heads * size, (heads + groups) * size)
            makers = tuple(Rows(path, width, start) for width, start in zip((query, size, size), starts, strict=True))
        else:
            makers = tuple(Rows(by_role[role].path, width) for role, width in (("q", query), ("k", size), ("v", size)))
        module = leave.path.rpartition(".")[0]
        tables, together = _tables(model, widths, leave, module)
        found.append(Units(leave.path, groups, leave.d_in // groups, makers, together, tables))
    return found


def neuron_numbers(model: PreTrainedModel, units: Sequence[Units], kept: Callable[[Units], int]) -> dict[str, int]:
    """The configuration's keys with their new values, where each feed-forward layer keeps so many neurons."""
    keys = widths_of(model).neurons
    return {key: kept(each) for each in units for pattern, key in keys.items() if fnmatchcase(split_path(each.leave)[0], pattern)}


def head_numbers(model: PreTrainedModel, units: Sequence[Units], kept: int) -> dict[str, int]:
    """The configuration's keys with their new values, where each attention keeps so many heads of keys and values."""
    widths = widths_of(model)
    first, heads = units[0], int(getattr(model.config, str(widths.heads)))
    found = {str(widths.heads): kept * heads // first.count}
    if widths.groups is not None:
        found[widths.groups] = kept
    if widths.head is not None:
        found[widths.head] = first.width * first.count // heads
    return found


def shrink(model: PreTrainedModel, units: Sequence[Units], cut: Cut) -> None:
    """Remove all other units, set the configuration's numbers, and what modules remember of their sizes.

    Raises:
        RefusedError: a model made from the new configuration would have other shapes; nothing is changed then.
    """
    rows, columns = _selections(units, cut)
    reference = _reference(model, cut.numbers)
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    after = {name: _shape_after(model, name, tensor, rows, columns) for name, tensor in model.state_dict().items()}
    odd = [f"{name}: {shape}, and {shapes[name]} by the configuration" for name, shape in after.items()
           if name in shapes and shapes[name] != shape]
    if odd:
        raise RefusedError("a configuration of this family cannot describe the pruned model", got=listed(
            f"{key} {value}" for key, value in cut.numbers.items()), problems=odd[:8])
    for path in {**rows, **columns}:
        _select(model.get_submodule(path), rows.get(path), columns.get(path))
    for config in {id(each): each for each in _configs(model)}.values():
        for key, value in cut.numbers.items():
            setattr(config, key, value)
    made = dict(reference.named_modules())
    for path, module in model.named_modules():
        if type(made.get(path)) is type(module):
            own, new = vars(module), vars(made[path])
            own.update({key: value for key, value in new.items() if type(value) is int and type(own.get(key)) is int})


# ---- finding units ------------------------------------------------------------------------------------------------------


def _by_module(model: PreTrainedModel, roles: Sequence[str], key: Callable[[Site], str],
               what: str) -> list[list[Site]]:
    """The layers of these roles, by block (and key), of all blocks."""
    found: dict[tuple[str, int | None, str], list[Site]] = {}
    for site in all_sites(model):
        if site.kind == "linear" and site.part is None and site.layer is not None and site.role in roles:
            found.setdefault((site.stack, site.layer, key(site)), []).append(site)
    if not found:
        raise RefusedError(f"this model has no {what} that could be removed", got=model.config.model_type)
    compact = [site.path for sites in found.values() for site in sites
               if isinstance(model.get_submodule(site.path), CompactLinear)]
    if compact:
        raise RefusedError("these layers are quantised or factored already, so that no units can be removed from them",
                           problems=compact[:8], hint="Remove units first, and compress the layers in a later step.")
    return list(found.values())


def _tables(model: PreTrainedModel, widths: Widths, leave: Site, module: str) -> tuple[tuple[str, ...], str]:
    """The tables with a column for each head of an attention, and the name under which choices are made together."""
    if widths.by_head is None:
        return (), leave.path
    inside = f"{leave.stack}.{leave.layer}."
    rest = module.removeprefix(inside)
    tables = [path for path, _ in model.named_modules() if path.endswith(f".{rest}.{widths.by_head}")
              and split_path(path)[0] == leave.stack]
    if not tables:
        return (), leave.path
    return tuple(path for path in tables if path.startswith(module + ".")), f"{leave.stack}.{rest}"


# ---- removing -----------------------------------------------------------------------------------------------------------


def _selections(units: Sequence[Units], cut: Cut) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rows and columns to keep, by path."""
    rows: dict[str, Tensor] = {}
    columns: dict[str, Tensor] = {}
    for each in units:
        kept = cut.kept[each.leave]
        columns[each.leave] = each.columns(kept)
        for part in each.makers:
            indices = spread(kept, part.width, part.start)
            rows[part.path] = torch.cat([rows[part.path], indices]) if part.path in rows else indices
        columns |= dict.fromkeys(each.tables, kept)
    return rows, columns


def _select(module: nn.Module, rows: Tensor | None, columns: Tensor | None) -> None:
    """Keep rows (outputs) and columns (inputs; of a table its values) of a layer, in place."""
    turned = isinstance(module, Conv1D)
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise RefusedError("not a layer with a dense weight", got=type(module).__name__)
    for dim, indices in ((1 if turned else 0, rows), (0 if turned else 1, columns)):
        if indices is not None:
            weight = weight.detach().index_select(dim, indices.to(weight.device))
    module.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    bias = module._parameters.get("bias")
    if bias is not None and rows is not None:
        module.bias = nn.Parameter(bias.detach().index_select(0, rows.to(bias.device)), requires_grad=False)


def _shape_after(model: nn.Module, name: str, tensor: Tensor, rows: dict[str, Tensor],
                 columns: dict[str, Tensor]) -> tuple[int, ...]:
    path, _, key = name.rpartition(".")
    shape = list(tensor.shape)
    if path not in rows and path not in columns:
        return tuple(shape)
    turned = isinstance(model.get_submodule(path), Conv1D)
    if path in rows:
        shape[-1 if turned else 0] = len(rows[path])
    if path in columns and key == "weight":
        shape[0 if turned else 1] = len(columns[path])
    return tuple(shape)


def _reference(model: PreTrainedModel, numbers: dict[str, int]) -> PreTrainedModel:
    """A model without values of the new configuration."""
    try:
        config = type(model.config).from_dict(model.config.to_dict() | numbers)
        with torch.device("meta"):
            return type(model)(config)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise RefusedError("transformers does not accept the configuration of the pruned model",
                           got=listed(f"{key} {value}" for key, value in numbers.items()), hint=str(error)[:300]) from None


def _configs(model: nn.Module) -> Iterator[PreTrainedConfig]:
    for module in model.modules():
        own: Any = vars(module).get("config")
        if isinstance(own, PreTrainedConfig):
            yield own
