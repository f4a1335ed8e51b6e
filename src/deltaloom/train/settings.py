"""`TrainSettings`: the `train` section of a run file."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from deltaloom.settings import Settings

DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")
Fraction = Annotated[float, Field(gt=0, lt=1)]
Every = Annotated[int, Field(ge=1)] | Fraction | None

# These change when something is looked at or kept, not what is trained: a resumed run may have others.
FREE_TO_CHANGE = frozenset({"max_time", "eval_every", "save_every", "keep_checkpoints", "log_every", "shard"})


class EarlyStop(Settings):
    """When to stop before the end: evaluations that bring nothing new."""

    patience: int = Field(3, ge=1, description="evaluations in a row without a better metric after which training stops")
    min_delta: float = Field(0.0, ge=0, description="how much better a metric must be to count as better")


class TrainSettings(Settings):
    """How to train: for how long, with which optimizer, how large a step, when to evaluate and save."""

    epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="passes over the training rows, 1 unless max_steps or max_time is given")
    max_steps: Annotated[int, Field(ge=1)] | None = Field(None, description="optimizer steps, instead of epochs")
    max_time: str | Annotated[float, Field(gt=0)] | None = Field(
        None, description="limit of the training loop's own time: 20m, 1h30m, or seconds; alone it also decides the steps")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="adamw or sgd")
    batch_size: Annotated[int, Field(ge=1)] | None = Field(
        None, description="rows per optimizer step, 16 unless batch_tokens is given")
    batch_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="real tokens per optimizer step at most, instead of batch_size")
    learning_rate: float = Field(1e-3, gt=0, description="the highest learning rate; a run file that names none gets "
                                 "the one that was measured for its methods, where there is one (docs/advice.md)")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="how the learning rate goes to zero, or not")
    warmup: float = Field(0.06, ge=0, lt=1, description="share of the steps in which the learning rate rises to its highest")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay (sgd: L2) of tensors with two or more dimensions")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="adamw: decay of the gradient's running mean and mean square")
    eps: float = Field(1e-8, gt=0, description="adamw: added to the denominator")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd: momentum")
    clip: Annotated[float, Field(gt=0)] | None = Field(1.0, description="largest norm of the gradient; null: no limit")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the base model; deltas are always fp32; auto: bf16 where the machine multiplies it fast")
    packing: bool = Field(False, description="several rows in one sequence, each seeing itself only")
    gradient_checkpointing: bool = Field(False, description="compute activations again in the backward pass to save memory")
    shard: bool = Field(False, description="spread the frozen base over the processes of the run, for one that fits no device")
    eval_every: Every = Field(None, description="steps, or a share of the run such as 0.1; default: after each epoch")
    save_every: Every = Field(0.1, description="steps, or a share of the run; null: after each epoch")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints to keep, the newest; the best one is kept besides")
    early_stop: EarlyStop | None = Field(None, description="stop when evaluations bring nothing new: {patience, min_delta}")
    metric: str | None = Field(None, description="what decides which step is best; default: the task's own metric")
    restore_best: bool = Field(False, description="end with the delta of the best evaluation instead of the last step's")
    log_every: Annotated[int, Field(ge=1)] | None = Field(
        None, description="steps between readings of loss and gradient norm; default: 1 on a CPU, 10 elsewhere")

    @field_validator("max_time")
    @classmethod
    def _is_a_duration(cls, value: str | float | None) -> str | float | None:
        if isinstance(value, str):
            seconds(value)
        return value

    @model_validator(mode="after")
    def _no_contradiction(self) -> TrainSettings:
        problems = []
        if self.epochs is not None and self.max_steps is not None:
            problems.append("epochs and max_steps exclude each other: give one of them")
        if self.batch_size is not None and self.batch_tokens is not None:
            problems.append("batch_size and batch_tokens exclude each other: give one of them")
        if self.optimizer == "sgd":
            problems += [f"{key} is a setting of optimizer adamw, but optimizer is sgd"
                         for key in ("betas", "eps") if self._set(key)]
        elif self._set("momentum"):
            problems.append("momentum is a setting of optimizer sgd, but optimizer is adamw")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _set(self, key: str) -> bool:
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @property
    def rows_per_step(self) -> int | None:
        """`batch_size` with its default; None when `batch_tokens` decides."""
        return self.batch_size or (None if self.batch_tokens else 16)

    @property
    def epoch_limit(self) -> float | None:
        """`epochs` with its default; None when steps or time alone decide."""
        return self.epochs or (None if self.max_steps or self.max_time else 1.0)

    @property
    def time_limit(self) -> float | None:
        """`max_time` in seconds."""
        return seconds(self.max_time) if isinstance(self.max_time, str) else self.max_time


def seconds(text: str) -> float:
    """The seconds of "20m", "1h30m", "90s" or "90".

    Raises:
        ValueError: something else, or nothing left of it.
    """
    found = DURATION.fullmatch(text.strip().lower().replace(" ", ""))
    parts = [float(part) if part else 0.0 for part in found.groups()] if found else []
    total = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if not total or not math.isfinite(total):
        raise ValueError(f"a duration is written 20m, 1h30m, 90s or as seconds, got '{text}'")
    return total
