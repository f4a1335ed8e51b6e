"""The blocks of a model: which stacks it has, and keeping some blocks of each, with its configuration changed to match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import nn

from deltaloom.architectures import BY_NUMBER, DEPTH, FAMILIES, LAYER_LISTS
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
    fixed: int  # so many of the first blocks hold what the later ones read (T5's table of positions), so that they stay

    def __len__(self) -> int:
        return len(self.blocks)


def stacks_of(model: PreTrainedModel) -> list[Blocks]:
    """The stacks of a model: one, or encoder and decoder.

    Raises:
        TargetError: it has none, the configuration does not count its blocks, or they are of several kinds.
    """
    family = FAMILIES.get(model.config.model_type)
    depths = family.depths if family is not None else {"*": DEPTH}
    found, problems = [], []
    for path in dict.fromkeys(site.stack for site in all_sites(model) if site.kind == "linear" and site.layer is not None):
        blocks = tuple(model.get_submodule(path).children())
        key = next((key for pattern, key in depths.items() if fnmatchcase(path, pattern)), DEPTH)
        if getattr(model.config, key, None) != len(blocks):  # a question about data: a configuration has what its family has
            problems.append(f"{path}: the configuration does not say in {key} that it has {len(blocks)} blocks")
            continue
        kinds = [_shape(block) for block in blocks]
        first = 1 if len(blocks) > 1 and kinds[0] != kinds[1] else 0
        if any(kind != kinds[-1] for kind in kinds[first:]):
            problems.append(f"{path}: its blocks are of several kinds")
        found.append(Blocks(path, blocks, key, first))
    if problems or not found:
        raise TargetError("this model's blocks cannot be taken apart", got=type(model).__name__, problems=problems,
                          hint="Name a compressor that changes single layers." if found or problems else None)
    return found


def keep_blocks(model: PreTrainedModel, kept: Mapping[str, Sequence[int]]) -> None:
    """Leave these blocks of each stack (by its path) in place of all, in this order; the configuration says so.

    Blocks are numbered anew, because a cache finds its keys and values by these numbers.

    Raises:
        TargetError: what a block computes depends on its number.
    """
    numbered = [key for key in BY_NUMBER if getattr(model.config, key, False)]
    if numbered:
        raise TargetError("a block of this model computes something else under another number, so that none can be dropped",
                          got=f"{numbered[0]} in the configuration")
    for stack in stacks_of(model):
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


def _shape(block: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(tensor.shape)) for name, tensor in block.state_dict().items()]


def _set_depth(config: Any, key: str, before: int, kept: Sequence[int]) -> None:
    for name in LAYER_LISTS:
        values = getattr(config, name, None)
        if isinstance(values, list | tuple) and len(values) == before:
            setattr(config, name, [values[index] for index in kept])
    setattr(config, key, len(kept))
