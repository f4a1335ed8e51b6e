"""What became of the trials: records, which is best, and the Pareto front; plain values, nothing of Optuna."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

FINISHED = ("complete", "pruned", "infeasible", "failed")


@dataclass(frozen=True)
class Objective:
    """What is to be as high or as low as possible."""

    name: str
    higher: bool


@dataclass(frozen=True)
class Record:
    """One trial.

    `state`: complete; pruned (ended early); infeasible (breaks a constraint); failed; lost (its worker died, another trial takes
    its settings); running; waiting. `values`: of the objectives, where it came so far. `measures`: everything that was measured.
    `curve`: the first objective at each evaluation. `seconds`: from beginning to end.
    """

    number: int
    state: str
    reason: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    measures: dict[str, float] = field(default_factory=dict)
    curve: list[float] = field(default_factory=list)
    again: int | None = None  # the lost trial whose settings it took
    parameters: dict[str, Any] = field(default_factory=dict)  # the settings as the study keeps them

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {key: value for key, value in asdict(self).items() if key != "parameters"}


def best_of(records: Sequence[Record], objectives: Sequence[Objective]) -> Record | None:
    """The complete trial with the best first objective; of several the one that is on the front."""
    front = pareto_front(records, objectives)
    return front[0] if front else None


def pareto_front(records: Sequence[Record], objectives: Sequence[Objective]) -> list[Record]:
    """The complete trials that no other one beats in an objective without being worse in another, in the order of the first.

    Of trials that are equal in all objectives the earliest one.
    """
    whole = [record for record in records if record.state == "complete"]
    costs = {record.number: [_cost(record, objective) for objective in objectives] for record in whole}
    front = [record for record in whole
             if not any(_beats(costs[other.number], costs[record.number])
                        or (costs[other.number] == costs[record.number] and other.number < record.number) for other in whole)]
    return sorted(front, key=lambda record: (costs[record.number], record.number))


def _cost(record: Record, objective: Objective) -> float:
    value = record.values[objective.name]
    return -value if objective.higher else value


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))
