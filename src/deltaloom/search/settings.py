"""`SearchSettings`: the `search` section of a run file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from deltaloom.settings import Settings
from deltaloom.train.settings import seconds

# What else than the metrics of the task may be an objective or bounded, and the key of a run's result that holds it.
MEASURES = {"parameters": "final_parameters", "flops_per_token": "flops_per_token", "seconds": "seconds",
            "delta_bytes": "delta_bytes", "peak_memory_bytes": "peak_memory_bytes"}
BEFORE_TRAINING = ("parameters", "flops_per_token")  # known as soon as the deltas are attached
SHARED = ("seconds", "peak_memory_bytes")  # what trials that are trained together do not have of their own
BOUND = re.compile(r"(<=|>=)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(%?)")


class SearchSettings(Settings):
    """How to search: for how long, how settings are proposed, which trials are cut short, what is better."""

    trials: int = Field(16, ge=1, le=100_000, description="trials in all, failed and pruned ones included")
    time: str | Annotated[float, Field(gt=0)] | None = Field(
        None, description="30m, 2h, or seconds: no trial begins when the trials before, divided by workers, took that long")
    sampler: Literal["tpe", "random", "gp", "nsga2", "grid"] = Field(
        "tpe", description="how settings are proposed; grid: every combination of a finite space, in random order")
    pruner: Literal["median", "asha", "hyperband", "none"] = Field(
        "median", description="which trials are ended after an evaluation; it looks at the first objective")
    objectives: tuple[str, ...] = Field(
        (), description=f"metrics of the task, or {', '.join(MEASURES)}; default: the metric by which a run is judged")
    constraints: dict[str, str] = Field(
        default_factory=dict, description='bounds by name, such as {parameters: "<= 0.5%", accuracy: ">= 0.8"}')
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(None, description="of the sampler; default: the run's seed")
    workers: int = Field(1, ge=1, le=64, description="processes on this machine that share its cores")
    cohort: int = Field(1, ge=1, le=64, description="trials that a worker trains at once over one frozen base")
    storage: str | None = Field(None, description="journal file or database URL; default: journal.log in the output folder")
    name: str | None = Field(None, min_length=1, description="of the study in its storage; default: the output folder's name")
    keep: Literal["best", "all"] = Field("best", description="of which trials deltas and checkpoints are kept")

    @field_validator("time")
    @classmethod
    def _is_a_duration(cls, value: str | float | None) -> str | float | None:
        if isinstance(value, str):
            seconds(value)
        return value

    @field_validator("objectives")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names one objective twice")
        return value

    @field_validator("constraints")
    @classmethod
    def _are_bounds(cls, value: dict[str, str]) -> dict[str, str]:
        bounds_of(value)
        return value

    @model_validator(mode="after")
    def _no_contradiction(self) -> SearchSettings:
        if self.workers > self.trials:
            raise ValueError(f"contradictory budgets: {self.workers} workers for {self.trials} trials")
        shared = [name for name in (*self.objectives, *self.constraints) if name in SHARED]
        if self.cohort > 1 and shared:
            raise ValueError(f"trials of a cohort share {' and '.join(SHARED)}, so that {shared[0]} says nothing of one of them: "
                             "write cohort: 1")
        return self

    @property
    def time_limit(self) -> float | None:
        """`time` in seconds."""
        return seconds(self.time) if isinstance(self.time, str) else self.time

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """The constraints, taken apart."""
        return bounds_of(self.constraints)


@dataclass(frozen=True)
class Bound:
    """A constraint: `name` is at most or at least `limit`; `share`: of the model's parameters."""

    name: str
    upper: bool
    limit: float
    share: bool

    def of(self, total: int) -> Bound:
        """The same with the limit as a number of parameters; `total` are those of the model."""
        return Bound(self.name, self.upper, self.limit * total, False) if self.share else self

    def excess(self, value: float) -> float:
        """How far a value is beyond the limit; it meets the constraint if this is zero or less."""
        return value - self.limit if self.upper else self.limit - value

    def __str__(self) -> str:
        number = f"{self.limit * 100:g}%" if self.share else f"{self.limit:.15g}"
        return f"{self.name} {'<=' if self.upper else '>='} {number}"


def bounds_of(constraints: Mapping[str, Any]) -> tuple[Bound, ...]:
    """The bounds that a mapping of names to texts such as "<= 5e4" writes.

    Raises:
        ValueError: a text is no bound, or one that nothing can meet.
    """
    found, problems = [], []
    for name, text in constraints.items():
        parts = BOUND.fullmatch(str(text).strip())
        if parts is None:
            problems.append(f'{name}: a bound is written "<= NUMBER" or ">= NUMBER", got {text!r}')
            continue
        share = parts[3] == "%"
        bound = Bound(name, parts[1] == "<=", float(parts[2]) / (100 if share else 1), share)
        if share and name != "parameters":
            problems.append(f"{name}: only parameters are bounded by a share (of the model's), got {text!r}")
        elif name in MEASURES and bound.upper and bound.limit <= 0:
            problems.append(f"{name}: nothing meets {text!r}, because there is always more than nothing of it")
        found.append(bound)
    if problems:
        raise ValueError("; ".join(problems))
    return tuple(found)
