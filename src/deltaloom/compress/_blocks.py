"""The blocks of a model: which stacks it has, and keeping some blocks of each, with its configuration changed to match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

from deltaloom.architectures import BY_NUMBER, DEPTH, FAMILIES, LAYER_LISTS
from deltaloom.compact.face import compact_layers
from deltaloom.errors import TargetError, listed
from deltaloom.sites import all_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Blocks:
    """One stack of a model: its path, its blocks in order, and the key of the configuration that counts them."""

    path: str
    blocks: tuple[nn.Module, ...]
    key: str
    fixed: int    # so many of the first blocks hold what the later ones read (T5's table of positions), so that they stay
    fault: str    # why no block can be dropped; empty if they can

    def __len__(self) -> int:
        return len(self.blocks)


def stacks_of(model: PreTrainedModel) -> list[Blocks]:
    """The stacks of a model: one, or encoder and decoder.

    Raises:
        TargetError: it has none.
    """
    family = FAMILIES.get(model.config.model_type)
    depths = family.depths if family is not None else {"*": DEPTH}
    found = []
    for path in dict.fromkeys(site.stack for site in all_sites(model) if site.kind == "linear" and site.layer is not None):
        blocks = tuple(model.get_submodule(path).children())
        key = next((key for pattern, key in depths.items() if fnmatchcase(path, pattern)), DEPTH)
        kinds = [_dense_names(block) for block in blocks]
        fixed = 1 if len(blocks) > 1 and kinds[0] != kinds[1] else 0
        fault = ""
        if getattr(model.config, key, None) != len(blocks):  # a question about data: a configuration has what its family has
            fault = f"{path}: the configuration does not say in {key} that it has {len(blocks)} blocks"
        elif any(kind != kinds[-1] for kind in kinds[fixed:]):
            fault = f"{path}: its blocks are of several kinds"
        found.append(Blocks(path, blocks, key, fixed, fault))
    if not found:
        raise TargetError("this model has no stack of blocks", got=type(model).__name__)
    return found


def check_droppable(stacks: Sequence[Blocks]) -> None:
    """That blocks can be dropped and the configuration can say so.

    Raises:
        TargetError: they cannot, with the reasons.
    """
    problems = [stack.fault for stack in stacks if stack.fault]
    if problems:
        raise TargetError("this model's blocks cannot be dropped", problems=problems,
                          hint="Name a compressor that changes single layers.")


def keep_blocks(model: PreTrainedModel, kept: Mapping[str, Sequence[int]]) -> None:
    """Leave these blocks of each stack (by its path) in place of all, in this order; the configuration says so.

    Blocks are numbered anew, because a cache finds its keys and values by these numbers.

    Raises:
        TargetError: what a block computes depends on its number, or the configuration cannot say what is left.
    """
    numbered = [key for key in BY_NUMBER if getattr(model.config, key, False)]
    if numbered:
        raise TargetError("a block of this model computes something else under another number, so that none can be dropped",
                          got=f"{numbered[0]} in the configuration")
    stacks = stacks_of(model)
    check_droppable(stacks)
    for stack in stacks:
        if stack.path not in kept:
            continue
        chosen = list(kept[stack.path])
        parent = model.get_submodule(stack.path.rpartition(".")[0])
        setattr(parent, stack.path.rpartition(".")[2], nn.ModuleList(stack.blocks[index] for index in chosen))
        for number, index in enumerate(chosen):
            for module in stack.blocks[index].modules():
                if isinstance(vars(module).get("layer_idx"), int):
                    module.layer_idx = number  # type: ignore[assignment]
        _set_depth(model.config, stack.key, len(stack), chosen)
        own: Any = vars(parent).get("config")
        if own is not None and own is not model.config:  # a copy in which this stack's depth is the only one (T5)
            _set_depth(own, DEPTH, len(stack), chosen)


def common_middle(stacks: Sequence[Blocks], first: int, last: int) -> list[int]:
    """The blocks between the kept ones, where all stacks have the same.

    Raises:
        TargetError: stacks of unequal depth, whose blocks one list of numbers cannot name.
    """
    lengths = {len(stack) for stack in stacks}
    if len(lengths) > 1:
        raise TargetError("the model's stacks are of unequal depth, so that the same numbers mean other blocks in each",
                          got=listed(f"{stack.path}: {len(stack)}" for stack in stacks), hint="Drop blocks instead.")
    return list(range(first, lengths.pop() - last))


def _dense_names(block: nn.Module) -> set[str]:
    """The names of a block's tensors, apart from those that a compact layer has in the place of its weight."""
    compact = tuple(f"{path}." for path in compact_layers(block))
    names = {name for name in block.state_dict() if not (compact and name.startswith(compact))}
    return names | {f"{path}weight" for path in compact}


def _set_depth(config: Any, key: str, before: int, kept: Sequence[int]) -> None:
    for name in LAYER_LISTS:
        values = getattr(config, name, None)
        if isinstance(values, list | tuple) and len(values) == before:
            setattr(config, name, [values[index] for index in kept])
    setattr(config, key, len(kept))
