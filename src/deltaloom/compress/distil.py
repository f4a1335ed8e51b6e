"""Distillation: the compressed model (student) learns to do what the original (teacher) does, on text that the user gives.

    logits    T^2 KL(softmax(z_teacher / T) || softmax(z_student / T)) per scored token or row; numbers: (z_t - z_s)^2
              (Hinton et al., arXiv 1503.02531)
    hidden    mean over the student's blocks of |h_t - h_s|^2 / |h_t|^2 per token, each block compared with the teacher's block at
              the same relative depth
    offsite   the same of one block alone, the last before `keep_last`: what Offsite-Tuning trains its emulators with
              (arXiv 2302.04870)

plus `task_weight` times the task's own loss on the same tokens. The teacher is the untouched model, loaded again beside the
student. All weights of the blocks are trained in fp32, or deltas of the student, which are folded in afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from deltaloom.compress._blocks import stacks_of
from deltaloom.compress._factors import opened_factors
from deltaloom.compress._hidden import is_decoder, real_places
from deltaloom.compress._learning import TrainingStep, everything, free_layers, learn, methods_of, narrowed
from deltaloom.compress.base import Facts, Work
from deltaloom.data.batches import Batch
from deltaloom.data.encode import IGNORED
from deltaloom.errors import RefusedError, TargetError
from deltaloom.train.settings import TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MICRO_TOKENS = 512  # of a micro-batch: the logits of both models are kept for it


class Distil(TrainingStep):
    """Let the model learn from the original; by default all weights of the blocks do."""

    name: ClassVar[str] = "distil"

    loss: Literal["logits", "hidden", "offsite"] = "logits"
    """What is compared."""
    temperature: float = Field(2.0, gt=0)
    """logits: T above."""
    weight: float = Field(1.0, gt=0)
    """Of the comparison; Offsite-Tuning takes 30 for its own."""
    task_weight: float = Field(0.5, ge=0)
    """Of the task's own loss."""
    keep_last: int = Field(0, ge=0)
    """offsite: blocks at the end that the compared one lies before."""
    train: TrainSettings = TrainSettings(epochs=1, learning_rate=1e-4)
    """As the `train` section of a run file; by default one epoch at a learning rate of 1e-4."""

    def sketch(self, model: PreTrainedModel) -> None:
        """Nothing changes its shape.

        Raises:
            TargetError: a method finds nothing to train, or there is no block to compare.
        """
        with opened_factors(model):
            for method in narrowed(methods_of(self.deltas, self.name) or [everything(model)], self.layers):
                method.sites(model)
        short = [stack.path for stack in stacks_of(model) if len(stack) <= self.keep_last]
        if short:
            raise TargetError("no block is left to compare", got=f"keep_last {self.keep_last}", problems=short)

    def apply(self, work: Work) -> Facts:
        """Train with the teacher's answers and fold in."""
        teacher = work.teacher().requires_grad_(False)
        methods = methods_of(self.deltas, self.name) or [everything(work.model)]
        methods = narrowed(narrowed(methods, self.layers), free_layers(work))
        with ExitStack() as hooks:
            if self.loss == "logits":
                compare: Compare = Logits(self.temperature)
            else:
                compare = Hidden(work, teacher, None if self.loss == "hidden" else self.keep_last, hooks)
            pupil = Pupil(teacher, compare, self, work.task.generates)
            return learn(work, methods, pupil, self.train, micro_tokens=MICRO_TOKENS, seed=self.seed)


Compare = Callable[[Batch, Tensor, Tensor], Tensor]


class Pupil:
    """What the training loop takes for a task: the student's loss against the teacher."""

    def __init__(self, teacher: PreTrainedModel, compare: Compare, settings: Distil, generates: bool) -> None:
        self.teacher, self.compare, self.settings = teacher, compare, settings
        self.more = {"use_cache": False} if generates else {}

    def loss(self, tuned: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | float]:
        """(sum over the scored tokens or rows, their number)."""
        with torch.no_grad():
            theirs, wanted = scored(self.teacher(**batch.inputs, **self.more).logits, batch)
        own, _ = scored(tuned(**batch.inputs, **self.more).logits, batch)
        count = max(1, len(own))
        total = self.settings.weight * self.compare(batch, theirs, own) * count
        if self.settings.task_weight and wanted is not None:
            total = total + self.settings.task_weight * task_loss(own, wanted)
        return total, float(count)


def task_loss(own: Tensor, wanted: Tensor) -> Tensor:
    """The summed cross-entropy of classes or tokens, or squared error of numbers."""
    if own.shape[-1] == 1:
        return F.mse_loss(own.flatten(), wanted.float(), reduction="sum")
    return F.cross_entropy(own, wanted, reduction="sum")


def scored(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """(logits in fp32 of the tokens or rows that have a target (n, classes), the targets (n,))."""
    labels = batch.labels
    if labels is None or labels.ndim == 1:
        return logits.float(), labels
    if batch.places is not None:  # a causal model: the next token is learned
        places = batch.places
        return logits.flatten(0, 1)[places].float(), labels.flatten()[places + 1]
    places = (labels.flatten() != IGNORED).nonzero().squeeze(1)
    return logits.flatten(0, 1)[places].float(), labels.flatten()[places]


class Logits:
    """The mean divergence of the softened answers, times the squared temperature so that its gradients keep their size."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, batch: Batch, theirs: Tensor, own: Tensor) -> Tensor:
        """A scalar."""
        if own.shape[-1] == 1:
            return F.mse_loss(own, theirs)
        soft = (F.log_softmax(each / self.temperature, -1) for each in (own, theirs))
        student, teacher = soft
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * self.temperature ** 2


class Hidden:
    """The mean relative squared distance of blocks' outputs, read by hooks while both models run."""

    def __init__(self, work: Work, teacher: PreTrainedModel, keep_last: int | None, hooks: ExitStack) -> None:
        self.pairs: list[tuple[bool, list[Tensor], list[Tensor]]] = []
        for student, other in zip(stacks_of(work.model), stacks_of(teacher), strict=True):
            decoder = is_decoder(work.model, student)
            for mine, its in matched(len(student), len(other), keep_last):
                pair = (decoder, list[Tensor](), list[Tensor]())
                self.pairs.append(pair)
                for block, found in ((student.blocks[mine], pair[1]), (other.blocks[its], pair[2])):
                    hooks.callback(block.register_forward_hook(_keep_in(found)).remove)

    def __call__(self, batch: Batch, theirs: Tensor, own: Tensor) -> Tensor:
        """A scalar, of what the hooks saw in this batch."""
        terms = []
        for decoder, mine, its in self.pairs:
            if not mine or not its:
                raise RefusedError("a block whose output is compared was not run")
            student, teacher = mine[-1].float(), its[-1].float()
            places = real_places(batch, decoder)
            if places is not None:
                student, teacher = student[places], teacher[places]
            terms.append((student - teacher).square().mean() / teacher.square().mean().clamp_min(1e-12))
            mine.clear()
            its.clear()
        return torch.stack(terms).mean()


def matched(student: int, teacher: int, keep_last: int | None) -> list[tuple[int, int]]:
    """Which blocks are compared: (student's, teacher's); with `keep_last` the one before so many last blocks alone."""
    if keep_last is not None:
        return [(student - keep_last - 1, teacher - keep_last - 1)]
    return [(block, -(-(block + 1) * teacher // student) - 1) for block in range(student)]


def _keep_in(found: list[Tensor]) -> Callable[..., None]:
    def hook(block: nn.Module, arguments: Sequence[Any], output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    return hook
