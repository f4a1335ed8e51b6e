"""The contract of compressors: settings that make a model smaller, one step of a list.

    model -> sketch (shapes only: what it will weigh) -> apply (the work, on calibration batches where it needs them) -> facts

A compressor changes `work.model` in place or puts another model there. What can be checked is checked in `sketch`, which
runs on a model without values before any work is done: a ratio that cannot be met, a layer that it does not fit.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from deltaloom.errors import RefusedError, SettingsError, did_you_mean
from deltaloom.registry import class_named, names_in
from deltaloom.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltaloom.data.batches import Batch
    from deltaloom.data.encode import Example
    from deltaloom.evaluate.base import Task


@dataclass
class Work:
    """What a compressor works on. Steps of one list share it, so that each sees what the one before it made."""

    model: PreTrainedModel
    task: Task                                     # batches, losses and metrics of the user's data
    batches: Sequence[Batch] = ()                  # calibration rows, the same for every step; empty where none were given
    examples: Sequence[Example] = ()               # all the rows that the user gave, for steps that train
    original: Callable[[], PreTrainedModel] | None = None  # loads the untouched model again: the teacher of distillation
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    say: Callable[[str], None] = print
    promised: list[dict[str, str]] = field(default_factory=list)  # what stays bit for bit in all later steps: Facts.hashes

    def teacher(self) -> PreTrainedModel:
        """The untouched model, loaded again.

        Raises:
            RefusedError: nobody said where it comes from.
        """
        if self.original is None:
            raise RefusedError("the original model is needed here, and nothing says how to load it",
                               hint="Give Work(original=...).")
        return self.original().eval()


@dataclass
class Facts:
    """What a step did, for the report."""

    layers: list[dict[str, Any]] = field(default_factory=list)  # one record a layer: `layer`, and errors, ranks, shares, ...
    figures: dict[str, float] = field(default_factory=dict)     # of the whole step, by names that say their unit
    notes: list[str] = field(default_factory=list)              # what a user should know; shown as warnings
    hashes: list[dict[str, str]] = field(default_factory=list)  # of what was kept bit for bit: `tensor`, `original`, `sha256`
    inner: list[dict[str, Any]] = field(default_factory=list)   # the records of steps within this step: `step`, `facts`

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


class Compressor(Settings, ABC):
    """Settings of one step. One file under compress/ each; `name` is the file's name with hyphens."""

    name: ClassVar[str]
    calibrates: ClassVar[bool] = False  # needs calibration rows; the job refuses a list without data before it loads a model
    estimates: ClassVar[bool] = False   # values decide shapes, so that `sketch` can only give an upper bound
    leads: ClassVar[bool] = False       # has to be the first step, because what it promises is about the original

    def needs_rows(self) -> bool:
        """Whether it needs calibration rows with these settings; overridden where only some of them do."""
        return self.calibrates

    def within(self, layers: Sequence[int]) -> Self:
        """The same step for these blocks (of each stack) alone: what lies around them has to stay bit for bit.

        The default narrows the setting `layers`, which a compressor that works layer by layer has (None: all blocks).

        Raises:
            RefusedError: the step cannot be restricted, or none of its blocks is left.
        """
        if "layers" not in type(self).model_fields:
            raise RefusedError(f"{self.name} changes the whole model, so that it cannot leave blocks as they are")
        own = self.model_dump()["layers"]
        left = tuple(layer for layer in layers if own is None or layer in own)
        if not left:
            raise RefusedError(f"{self.name} has no block left to change", got=own, legal=list(layers))
        return self.model_copy(update={"layers": left})

    @abstractmethod
    def sketch(self, model: PreTrainedModel) -> None:
        """Change a model on the meta device in shape as `apply` will: afterwards its tensors weigh what the result will weigh.

        Raises:
            RefusedError, TargetError: the ratio cannot be met, or a layer is of a kind that this does not fit; all at once.
        """

    @abstractmethod
    def apply(self, work: Work) -> Facts:
        """Do it. Called after `sketch` has passed on a model of the same shapes."""


def compressor_from(record: dict[str, Any], where: str = "compress") -> Compressor:
    """The compressor that a record of a run file states: {"method": name, setting: value, ...}.

    Raises:
        SettingsError: no such compressor, an unknown setting or an illegal value; `where` is the key path that it names.
    """
    name = record.get("method")
    legal = names_in("deltaloom.compress")
    if not isinstance(name, str) or name not in legal:
        raise SettingsError(f"{where}: each entry needs 'method: NAME'" if not isinstance(name, str) else
                            f"{where}: unknown compressor", got=record if not isinstance(name, str) else name, legal=legal,
                            hint=did_you_mean(name, legal) if isinstance(name, str) else None)
    cls = class_named("deltaloom.compress", name, Compressor, "compressor")  # type: ignore[type-abstract]
    return cls.parse({key: value for key, value in record.items() if key != "method"}, where)


def compressor_record(step: Compressor) -> dict[str, Any]:
    """What `compressor_from` reads: the name and every setting."""
    return {"method": step.name, **step.as_dict()}


def tensor_hash(tensor: Tensor) -> str:
    """The sha256, in hex, of a tensor's type, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_kept(model: torch.nn.Module, hashes: Sequence[Mapping[str, str]], key: str = "tensor") -> None:
    """That tensors are bit for bit what `Facts.hashes` says; `key` "original" names them as the original model does.

    Raises:
        RefusedError: those that are missing or differ.
    """
    state = model.state_dict()
    wrong = [record[key] for record in hashes if record[key] not in state or tensor_hash(state[record[key]]) != record["sha256"]]
    if wrong:
        raise RefusedError(f"{len(wrong)} of {len(hashes)} tensors are not bit for bit what they have to be", problems=wrong[:20],
                           hint="A step changed what an earlier one promised to keep, or this is another model.")


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and saved buffers, tied ones once; of a model on the meta device too."""
    seen: dict[int, int] = {}
    for _, tensor in model.state_dict(keep_vars=True).items():
        seen[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())
