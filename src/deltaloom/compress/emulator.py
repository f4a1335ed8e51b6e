"""The emulator of private tuning: a smaller stand-in for a model whose ends are the model's own, bit for bit.

Tokenizer, embeddings, everything outside the blocks, and the chosen first and last blocks stay as they are, so that a prefix
trained at the emulator's front fits the original's; the blocks between are fewer (`middle: 8`), or compressed by any list of
steps kept to them (`middle: [{method: ...}]`). The facts hold a sha256 of every kept tensor under its name here and in the
original, and compression.json one of the tokenizer; `verify` holds a model against them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from deltaloom.compress._blocks import Blocks, common_middle, stacks_of
from deltaloom.compress.base import Compressor, Facts, Work, check_kept, compressor_from, compressor_record, tensor_hash
from deltaloom.compress.drop_layers import DropLayers
from deltaloom.errors import CheckpointError, TargetError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Emulator(Compressor):
    """Keep the ends, compress the middle."""

    name: ClassVar[str] = "emulator"
    leads: ClassVar[bool] = True

    middle: Annotated[int, Field(ge=0)] | tuple[dict[str, Any], ...]
    """How many blocks stay between the kept ends, or the steps that compress them."""
    keep_first: int = Field(2, ge=1)
    """First blocks of each stack that stay bit for bit; a prefix may sit on these."""
    keep_last: int = Field(2, ge=0)
    """Last blocks of each stack that stay bit for bit."""
    choose: Literal["uniform", "block-influence", "cluster"] = "uniform"
    """With a number as `middle`: which blocks stay; all but uniform need calibration rows."""

    @model_validator(mode="after")
    def _known_steps(self) -> Emulator:
        if isinstance(self.middle, tuple) and not self.middle:
            raise ValueError("middle: name a number of blocks, or at least one step")
        nested = [step.name for step in self._steps() if step.leads]
        if nested:
            raise ValueError(f"middle: {nested[0]} cannot be a step within")
        return self

    def needs_rows(self) -> bool:
        """As the steps within do."""
        return any(step.needs_rows() for step in self._steps())

    def sketch(self, model: PreTrainedModel) -> None:
        """The shapes that the steps within make.

        Raises:
            TargetError: too few blocks to keep so many. RefusedError: as the steps within.
        """
        self._check(stacks_of(model))
        for step in self._steps():
            self._placed(step, model).sketch(model)

    def apply(self, work: Work) -> Facts:
        """Compress the middle and prove that the rest is as it was.

        Raises:
            RefusedError: a step within changed a tensor that has to stay.
        """
        before = stacks_of(work.model)
        self._check(before)
        depths = {stack.path: len(stack) for stack in before}
        kept = {name: tensor_hash(tensor) for name, tensor in work.model.state_dict().items() if not self._between(name, depths)}
        facts = Facts()
        for step in self._steps():
            placed = self._placed(step, work.model)
            inner = placed.apply(work)
            facts.inner.append({"step": compressor_record(placed), "facts": inner.as_dict()})
            facts.notes += inner.notes
        now = {stack.path: len(stack) for stack in stacks_of(work.model)}
        facts.hashes = [{"tensor": _moved(name, depths, now, self.keep_first), "original": name, "sha256": digest}
                        for name, digest in kept.items()]
        check_kept(work.model, facts.hashes)
        blocks = self.keep_first + self.keep_last
        facts.figures = {"kept_tensors": float(len(kept)), "blocks_before": float(sum(depths.values())),
                         "blocks_after": float(sum(now.values())), "kept_blocks": float(blocks * len(now))}
        return facts

    def _steps(self) -> list[Compressor]:
        if isinstance(self.middle, int):
            return [DropLayers(keep=self.middle, choose=self.choose, keep_first=self.keep_first, keep_last=self.keep_last)]
        return [compressor_from(dict(entry), f"middle.{index}") for index, entry in enumerate(self.middle)]

    def _placed(self, step: Compressor, model: PreTrainedModel) -> Compressor:
        """The step kept to the middle that there is now."""
        if isinstance(self.middle, int):
            return step
        return step.within(common_middle(stacks_of(model), self.keep_first, self.keep_last))

    def _check(self, stacks: Sequence[Blocks]) -> None:
        short = [f"{stack.path} has {len(stack)} blocks" for stack in stacks if len(stack) <= self.keep_first + self.keep_last]
        if short:
            raise TargetError("the model has no block between the kept ones", problems=short, hint="Keep fewer.",
                              got=f"keep_first {self.keep_first}, keep_last {self.keep_last}")

    def _between(self, name: str, depths: Mapping[str, int]) -> bool:
        """Whether a tensor belongs to a block of the middle."""
        return any(self.keep_first <= layer < depth - self.keep_last for path, depth in depths.items()
                   if (layer := _layer(name, path)) is not None)


def verify(model: PreTrainedModel, hashes: Sequence[Mapping[str, str]], *, original: bool = False) -> None:
    """That every kept tensor of an emulator (or, with `original`, of the model it stands for) is what `Facts.hashes` says.

    Raises:
        CheckpointError: there is nothing to hold it against. RefusedError: tensors that are missing or differ.
    """
    if not hashes:
        raise CheckpointError("these facts hold no checksum of a kept tensor", hint="Is this the record of an emulator?")
    check_kept(model, hashes, "original" if original else "tensor")


def _layer(name: str, path: str) -> int | None:
    """The number of the block of this stack that a tensor belongs to."""
    rest = name.removeprefix(f"{path}.")
    number = rest.partition(".")[0]
    return int(number) if rest != name and number.isdigit() else None


def _moved(name: str, before: Mapping[str, int], now: Mapping[str, int], first: int) -> str:
    """The name of a kept tensor after blocks before its own have gone."""
    for path, depth in before.items():
        layer = _layer(name, path)
        if layer is not None and layer >= first:
            rest = name.removeprefix(f"{path}.").partition(".")[2]
            return f"{path}.{layer - depth + now[path]}.{rest}"
    return name
