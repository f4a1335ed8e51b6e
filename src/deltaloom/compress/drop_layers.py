"""Dropping whole blocks: fewer layers, each as it was, so that the result is smaller and faster in proportion.

Which blocks stay, of those that may be dropped:

    uniform          evenly spaced, the first and the last among them (Offsite-Tuning, arXiv 2302.04870)
    block-influence  those that turn the hidden states most: 1 - mean cos(x_in, x_out) over the calibration tokens
                     (ShortGPT, arXiv 2403.03853)
    cluster          neighbours whose outputs are alike (linear CKA) form clusters, and of each cluster the block stays that is
                     most like the others in it; the grouping of CRaSh (arXiv 2310.15477), without its repetition of the block

The hidden states of a dropped block pass by it, as its residual branch lets them do. `heal` or `distil` after it repair much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from deltaloom.compress._blocks import Blocks, check_droppable, keep_blocks, stacks_of
from deltaloom.compress._hidden import Observer, Seen, watched
from deltaloom.compress.base import Compressor, Facts, Work
from deltaloom.errors import RefusedError, TargetError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_TOKENS = 1024  # whose outputs are compared for `cluster`: their Gram matrix has 4 MB a block
Choice = dict[str, list[int]]


class DropLayers(Compressor):
    """Keep some of the blocks of each stack."""

    name: ClassVar[str] = "drop-layers"

    keep: Annotated[int, Field(ge=0)] | None = None
    """Blocks that stay, of those of each stack that may be dropped."""
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The same as a share: 0.8 keeps four of five."""
    choose: Literal["uniform", "block-influence", "cluster"] = "block-influence"
    """Which ones; all but uniform need calibration rows."""
    keep_first: int = Field(0, ge=0)
    """So many first blocks of each stack stay in any case."""
    keep_last: int = Field(0, ge=0)
    """So many last blocks of each stack stay in any case."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Only these blocks may be dropped; default: all but the first and last ones that are kept."""

    @model_validator(mode="after")
    def _one_amount(self) -> DropLayers:
        if (self.keep is None) == (self.ratio is None):
            raise ValueError("give one of keep (a number of blocks) and ratio (a share of them)")
        return self

    def needs_rows(self) -> bool:
        """All choices but the even one look at hidden states."""
        return self.choose != "uniform"

    def sketch(self, model: PreTrainedModel) -> None:
        """As many blocks fewer.

        Raises:
            RefusedError: nothing would be dropped, or more would stay than there are. TargetError: blocks that do not exist.
        """
        stacks = stacks_of(model)
        keep_blocks(model, {stack.path: self._kept(stack, _even(self._free(stack), self._count(stack))) for stack in stacks})

    def apply(self, work: Work) -> Facts:
        """Choose and drop."""
        stacks = stacks_of(work.model)
        check_droppable(stacks)
        ways: dict[str, Callable[[Work, Sequence[Blocks]], tuple[Choice, Facts]]] = {
            "uniform": self._uniform, "block-influence": self._by_influence, "cluster": self._by_clusters}
        chosen, facts = ways[self.choose](work, stacks)
        kept = {stack.path: self._kept(stack, chosen[stack.path]) for stack in stacks}
        keep_blocks(work.model, kept)
        for record in facts.layers:
            record["kept"] = record["layer"] in kept[record["stack"]]
        facts.figures = {"blocks_before": float(sum(map(len, stacks))), "blocks_after": float(sum(map(len, kept.values())))}
        return facts

    def _free(self, stack: Blocks) -> list[int]:
        """The blocks that may be dropped."""
        wrong = [layer for layer in self.layers or () if layer >= len(stack)]
        if wrong or self.keep_first + self.keep_last > len(stack):
            raise TargetError(f"{self.name} names blocks that {stack.path} does not have", legal=f"{len(stack)} blocks",
                              got=f"layers {wrong}" if wrong else f"keep_first {self.keep_first}, keep_last {self.keep_last}")
        inside = range(max(self.keep_first, stack.fixed), len(stack) - self.keep_last)
        return [layer for layer in inside if self.layers is None or layer in self.layers]

    def _count(self, stack: Blocks) -> int:
        """How many of them stay."""
        free = len(self._free(stack))
        if not free:
            raise RefusedError(f"{self.name} may drop no block of {stack.path}", got=f"{len(stack)} blocks, all of them kept",
                               hint="Keep fewer first and last blocks.")
        count = self.keep if self.keep is not None else round((self.ratio or 0.0) * free)
        if count >= free or count + len(stack) - free < 1:
            raise RefusedError(f"{self.name} cannot keep that many of the blocks of {stack.path}" if count >= free else
                               f"{self.name} would leave no block of {stack.path}", got=count,
                               legal=f"{0 if free < len(stack) else 1} to {free - 1} of the {free} that may be dropped")
        return count

    def _kept(self, stack: Blocks, chosen: Sequence[int]) -> list[int]:
        free = set(self._free(stack))
        return [layer for layer in range(len(stack)) if layer in set(chosen) or layer not in free]

    def _uniform(self, work: Work, stacks: Sequence[Blocks]) -> tuple[Choice, Facts]:
        chosen = {stack.path: _even(self._free(stack), self._count(stack)) for stack in stacks}
        return chosen, Facts(layers=[{"stack": stack.path, "layer": layer} for stack in stacks for layer in range(len(stack))])

    def _by_influence(self, work: Work, stacks: Sequence[Blocks]) -> tuple[Choice, Facts]:
        facts, chosen = Facts(), {}
        influences = watched(work, stacks, Influence)
        for stack in stacks:
            values = [influence.value() for influence in influences[stack.path]]
            ranked = sorted(self._free(stack), key=lambda layer: (-values[layer], layer))
            chosen[stack.path] = sorted(ranked[:self._count(stack)])
            facts.layers += [{"stack": stack.path, "layer": layer, "influence": value} for layer, value in enumerate(values)]
        return chosen, facts

    def _by_clusters(self, work: Work, stacks: Sequence[Blocks]) -> tuple[Choice, Facts]:
        facts, chosen = Facts(), {}
        samples = watched(work, stacks, Sample)
        for stack in stacks:
            free, count = self._free(stack), self._count(stack)
            alike = similarity([samples[stack.path][layer].tokens() for layer in free])
            groups = clusters(alike, count)
            chosen[stack.path] = [free[medoid(alike, group)] for group in groups]
            number = {free[member]: index for index, group in enumerate(groups) for member in group}
            facts.layers += [{"stack": stack.path, "layer": layer} | ({"cluster": number[layer]} if layer in number else {})
                             for layer in range(len(stack))]
        return chosen, facts


class Influence(Observer):
    """1 - mean cosine between what goes into a block and what comes out of it."""

    def __init__(self, share: int) -> None:
        self.total, self.count = 0.0, 0

    def see(self, seen: Seen) -> None:
        """Add a batch's tokens (n, d_model)."""
        before, after = seen.before.double(), seen.after.double()
        self.total += float(torch.nn.functional.cosine_similarity(before, after, dim=-1).sum())
        self.count += len(before)

    def value(self) -> float:
        """The influence."""
        return 1 - self.total / max(self.count, 1)


class Sample(Observer):
    """Outputs of some tokens of every batch."""

    def __init__(self, share: int) -> None:
        self.share, self.kept = max(1, MOST_TOKENS // share), list[Tensor]()

    def see(self, seen: Seen) -> None:
        """Take evenly spaced tokens of a batch."""
        step = max(1, len(seen.after) // self.share)
        self.kept.append(seen.after[::step][:self.share].float())

    def tokens(self) -> Tensor:
        """(n, d_model)."""
        return torch.cat(self.kept)[:MOST_TOKENS]


def similarity(outputs: Sequence[Tensor]) -> Tensor:
    """Linear CKA between the rows of each pair of outputs (n, d): (m, m), from 0 to 1 (Kornblith et al., arXiv 1905.00414)."""
    grams = []
    for output in outputs:
        centred = output.double() - output.double().mean(0)
        gram = (centred @ centred.T).flatten()
        grams.append(gram / gram.norm().clamp_min(torch.finfo(torch.float64).tiny))
    return torch.stack([torch.stack([a @ b for b in grams]) for a in grams])


def clusters(alike: Tensor, count: int) -> list[list[int]]:
    """`count` groups of neighbours: again and again the two neighbouring groups become one that are most alike on average."""
    groups = [[index] for index in range(len(alike))]
    while len(groups) > max(count, 0):
        if count == 0:
            return []
        means = [float(alike[left][:, right].mean()) for left, right in pairwise(groups)]
        place = max(range(len(means)), key=lambda index: (means[index], -index))
        groups[place:place + 2] = [groups[place] + groups[place + 1]]
    return groups


def medoid(alike: Tensor, group: Sequence[int]) -> int:
    """The member that is most like the others; the first of several."""
    sums = [float(alike[member][list(group)].sum()) for member in group]
    return group[max(range(len(group)), key=lambda index: (sums[index], -index))]


def _even(free: Sequence[int], count: int) -> list[int]:
    """`count` of them, evenly spaced, with the first and the last."""
    if count < 2:
        return [free[len(free) // 2]] if count else []
    return [free[(2 * index * (len(free) - 1) + count - 1) // (2 * (count - 1))] for index in range(count)]
