"""What the methods whose rank is decided while training share: settings, and the controller that decides.

A method gives the controller `Pool`s of components (rank-one terms, private rows: `Terms`). After every optimizer step the
controller notes the importance of all their numbers; at the decisions of the schedule a rule says which components stay, the
others are silenced, and may come back at a later decision; after the last one they are removed from memory.
"""

from __future__ import annotations

import math
from abc import ABC
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from deltaloom.allocation import GATHERINGS, RULES, Importance, Schedule, Scores, keep_within
from deltaloom.deltas.base import Controller, KeepRows, Method, StepPlan, keep_rows
from deltaloom.errors import DeltaloomError, SettingsError
from deltaloom.events import RankChanged, Warned
from deltaloom.sites import Site


class AdaptiveMethod(Method, ABC):
    """A method whose rank is decided while training."""

    rank: float = Field(8.0, gt=0)
    """Mean final rank of a layer: what the budget at the end allows, in the numbers that a low-rank change of it has."""
    reserve: float = Field(1.5, ge=1)
    """How many times the final rank training starts with: what ranks may grow into."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the layer's inputs that the change does not see in training."""
    start: float = Field(0.1, ge=0, lt=1)
    """Share of the run before ranks are decided for the first time."""
    end: float = Field(0.4, ge=0, lt=1)
    """Share of the run after the last decision, with fixed ranks."""
    every: int | None = Field(None, ge=1)
    """Optimizer steps between decisions; a two-hundredth of the run, and at least 10, if not given."""
    importance: Literal["weight-gradient", "gradient"] = "weight-gradient"
    """What smoothness and uncertainty are taken of: |w g| of each number and its gradient, or |g|."""
    beta1: float = Field(0.85, ge=0, lt=1)
    """Weight of the past in the smoothness."""
    beta2: float = Field(0.85, ge=0, lt=1)
    """Weight of the past in the uncertainty."""

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        check_shares(self.start, self.end)
        return self

    def initial_rank(self) -> int:
        """The rank that training starts with, at least 1."""
        return max(1, math.ceil(self.rank * self.reserve - 1e-9))

    def check_ranks(self, sites: Sequence[Site], needed: int) -> None:
        """That every site can have a rank.

        Raises:
            SettingsError: sites whose smaller side is below it.
        """
        small = [f"{site.name} ({site.d_out} x {site.d_in})" for site in sites if min(site.d_out, site.d_in) < needed]
        if small:
            raise SettingsError(f"{self.name}: the initial rank is more than these layers can have",
                                got=f"rank {self.rank:g} x reserve {self.reserve:g} = {needed}", problems=small[:20],
                                hint="Lower rank or reserve, or leave these layers out of the targets.")


def check_shares(start: float, end: float) -> None:
    """That the parts of a run before the first and after the last decision leave room between them; raises ValueError."""
    if start + end >= 1:
        raise ValueError(f"start {start} and end {end} leave no part of the run to decide ranks in; their sum must be below 1")


class Rows(NamedTuple):
    """A parameter, and for each of its rows the component it belongs to; None: row e belongs to component e."""

    parameter: nn.Parameter
    owner: Tensor | None = None
    axis: int = 0  # along which its rows lie


class Terms(Protocol):
    """Components of one place: parameters whose rows belong to them, and what can be done with them."""

    mask: Tensor  # (E,) bool: which stay

    def parts(self) -> list[Rows]:
        """Their parameters."""

    def silence(self) -> None:
        """Make masked components do nothing."""

    def alive(self) -> Tensor:
        """(E,) bool: which do something now."""

    def numbers(self) -> Tensor:
        """(E,) float64: how many trained numbers each component has."""

    def keep(self, components: Tensor, keep_rows: KeepRows) -> None:
        """Remove all components but these."""

    def orthonormalise(self, strength: float) -> None:
        """A step towards orthonormal vectors."""

    def residual(self) -> float:
        """How far the vectors are from orthonormal ones; 0 where they need not be."""


@dataclass(frozen=True)
class Pool:
    """Terms, and how they are counted and shown."""

    terms: Terms
    group: str
    row: Callable[[], Tensor]       # (E,): the layer or frequency that each component is shown with
    costs: Callable[[], Tensor] | None = None  # (E,): what each takes of the budget; None: its trained numbers
    tube: Callable[[], Tensor] | None = None  # (E,): components of one number are kept or dropped together
    weight: Callable[[], Tensor] | None = None  # (E,): how often each counts within its tube


@dataclass(frozen=True)
class Policy:
    """How a controller decides."""

    rule: str
    importance: str
    beta1: float
    beta2: float
    schedule: Schedule
    target: float        # cost at the end
    row_name: str        # "layer" or "frequency"
    gathering: str = "mean"       # from the scores of a row's numbers to the row's, see `allocation.GATHERINGS`
    silent_between: bool = False  # masked components stay silent between decisions, and only their gradients are watched


class RankController(Controller):
    """Decides ranks by importance (with a policy), and keeps vectors orthonormal (with a strength above 0)."""

    def __init__(self, pools: Sequence[Pool], policy: Policy | None, plan: StepPlan, orthonormal: float = 0.0) -> None:
        self.pools = list(pools)
        self.policy = policy
        self.plan = plan
        self.orthonormal = orthonormal
        self.step = 0
        self.decisions = 0
        self.compact = False
        self.initial = float(self._costs().sum())
        self.previous = torch.zeros(len(self._costs()), dtype=torch.float64)
        self.importance = self._importance(policy) if policy is not None else None
        if policy is not None and plan.on_demand:
            self._begin_small(policy)

    def after_step(self, step: int) -> None:
        """Note importance, decide when it is time, keep vectors orthonormal."""
        self.step = step
        policy = self.policy
        if policy is not None and self.importance is not None and self.plan.on_demand:
            self.importance.observe()
            self._silence()
        elif policy is not None and not self.compact:
            if step < policy.schedule.last and self.importance is not None:
                self.importance.observe()
            if policy.schedule.due(step):
                self._decide(step, policy)
            if step >= policy.schedule.last or policy.silent_between:
                self._silence()
            if step >= policy.schedule.last and self.plan.keep_rows is not None:
                self._remove(self.plan.keep_rows)
        if self.orthonormal:
            for pool in self.pools:
                pool.terms.orthonormalise(self.orthonormal)

    def finish(self) -> None:
        """Remove what is masked.

        Raises:
            DeltaloomError: the run has passed without this controller.
        """
        if self.policy is None:
            return
        if not self.step:
            raise DeltaloomError("ranks were never decided", got="no call of after_step",
                                 hint="Call the controllers' after_backward and after_step around every optimizer step.")
        self._remove(keep_rows)  # also after the last decision: an earlier state may have been taken back
        kept, target = float(self._costs().sum()), self.policy.target
        if kept > target * (1 + 1e-9) and len(self._units().unique()) > 1:  # one component stays whatever it costs
            self.plan.emit(Warned(kind="budget", message="the delta is of a step before the last decision on ranks: it keeps "
                                  f"{kept / target:.3g} times the budget, {kept:.0f} instead of {target:.0f}"))

    # ---- growing on demand ----------------------------------------------------------------------------------------

    def reserve(self) -> int:
        """The numbers of the components that wait."""
        return int(sum(float(pool.terms.numbers()[~pool.terms.mask].sum()) for pool in self.pools)) if self.plan.on_demand else 0

    def grow(self, factor: float, most: int | None) -> int:
        """The waiting components with the best scores join in; what acts already stays."""
        if self.policy is None or not self.plan.on_demand or self.compact:
            return 0
        unit, weight, scores = self._units(), self._weights(), self._scores()
        kept = torch.cat([pool.terms.mask.cpu() for pool in self.pools])
        count = int(unit.max()) + 1 if len(unit) else 0
        numbers = torch.cat([pool.terms.numbers().double().cpu() for pool in self.pools])
        score, cost, here = (torch.zeros(count, dtype=torch.float64).index_add_(0, unit, values)
                             for values in (scores * weight, numbers, kept.double()))
        waiting = here == 0
        if not bool(waiting.any()):
            return 0
        now = float(cost[~waiting].sum())
        allowed = max(now * factor, now + float(cost[waiting].min()))
        allowed = allowed if most is None else min(allowed, now + most)
        if now + float(cost[waiting].min()) > allowed:
            return 0
        first = torch.cat([_round_robin(pool) for pool in self.pools])  # where no score tells them apart
        tie = torch.zeros(count, dtype=torch.float64).index_add_(0, unit, first) / (1 + first.max()) * 1e-12
        priority = score / cost / (score / cost).max().clamp_min(1e-300) - tie
        chosen = keep_within(torch.where(waiting, priority, torch.inf), cost, allowed)
        self._act(chosen[unit])
        self.policy = replace(self.policy, target=float(self._costs()[chosen[unit]].sum()))
        self._tell(self.step, scores, chosen[unit], float(allowed / numbers.sum()), self.policy.row_name)
        return int(cost[chosen].sum() - now)

    def _begin_small(self, policy: Policy) -> None:
        """Silence all but what the final budget allows, spread evenly; what does something already stays."""
        unit = self._units()
        count = int(unit.max()) + 1 if len(unit) else 0
        does = torch.cat([pool.terms.alive().cpu() for pool in self.pools])
        cost, order, alive = (torch.zeros(count, dtype=torch.float64).index_add_(0, unit, values) for values in (
            self._costs(), torch.cat([_round_robin(pool) for pool in self.pools]), does.double()))
        self._act((keep_within(-order, cost, policy.target) | (alive > 0))[unit])

    def _act(self, mask: Tensor) -> None:
        for pool, own in zip(self.pools, mask.split(self._sizes()), strict=True):
            pool.terms.mask.copy_(own)
        self._silence()

    # ---- deciding -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _decide(self, step: int, policy: Policy) -> None:
        scores, costs, unit, weight = self._scores(), self._costs(), self._units(), self._weights()
        count = int(unit.max()) + 1
        now, before, cost = (torch.zeros(count, dtype=torch.float64).index_add_(0, unit, values)
                             for values in (scores * weight, self.previous * weight, costs))
        allowed = policy.schedule.budget(step, self.initial, policy.target)
        priority, most = RULES[policy.rule](Scores(now, before, cost, allowed, policy.target))
        kept = keep_within(priority, cost, most)[unit]
        self.previous = scores
        self.decisions += 1
        for pool, mask in zip(self.pools, kept.split(self._sizes()), strict=True):
            pool.terms.mask.copy_(mask)
        self._silence()
        self._tell(step, scores, kept, allowed / float(costs.sum()), policy.row_name)

    @torch.no_grad()
    def _silence(self) -> None:
        for pool in self.pools:
            pool.terms.silence()

    def _remove(self, keep: KeepRows) -> None:
        """Drop masked components from memory, and what the optimizer holds of them."""
        self.compact, self.importance = True, None
        for pool in self.pools:
            if not bool(pool.terms.mask.all()):
                pool.terms.keep(pool.terms.mask.nonzero().squeeze(1), keep)

    def _scores(self) -> Tensor:
        """(n,) of all components: the sum over their parameters of what the rows' importance comes to."""
        if self.importance is None or self.policy is None:
            return self.previous
        gather = GATHERINGS[self.policy.gathering]
        values = iter(self.importance.scores())
        found = []
        for pool in self.pools:
            total = torch.zeros(len(pool.terms.mask), dtype=torch.float64)
            for _, owner, axis in pool.terms.parts():
                rows = gather(next(values).double().movedim(axis, 0)).cpu()
                total.index_add_(0, torch.arange(len(rows)) if owner is None else owner.cpu(), rows)
            found.append(total)
        return torch.cat(found)

    def _importance(self, policy: Policy) -> Importance:
        parameters = [rows.parameter for pool in self.pools for rows in pool.terms.parts()]
        return Importance(parameters, policy.importance, policy.beta1, policy.beta2)

    def _sizes(self) -> list[int]:
        return [len(pool.terms.mask) for pool in self.pools]

    def _costs(self) -> Tensor:
        return torch.cat([(pool.costs or pool.terms.numbers)().double().cpu() for pool in self.pools])

    def _units(self) -> Tensor:
        """(n,): the unit that each component is kept or dropped with; itself, or its tube."""
        found, start = [], 0
        for pool in self.pools:
            own = torch.arange(len(pool.terms.mask)) if pool.tube is None else pool.tube().cpu()
            found.append(own + start)
            start += int(own.max()) + 1 if len(own) else 0
        return torch.cat(found)

    def _weights(self) -> Tensor:
        return torch.cat([torch.ones(len(pool.terms.mask), dtype=torch.float64) if pool.weight is None
                          else pool.weight().double().cpu() for pool in self.pools])

    def _tell(self, step: int, scores: Tensor, kept: Tensor, allowed: float, row_name: str) -> None:
        numbers = torch.cat([pool.terms.numbers().cpu() for pool in self.pools])
        rows: dict[str, list[Tensor]] = {}
        for pool, own, mask in zip(self.pools, scores.split(self._sizes()), kept.split(self._sizes()), strict=True):
            rows.setdefault(pool.group, []).append(torch.stack((pool.row().cpu().double(), own, mask.double())))
        ranks, importance = {}, {}
        for group, parts in rows.items():
            row, own, mask = torch.cat(parts, 1)
            number = torch.bincount(row.long())
            ranks[group] = torch.zeros(len(number)).index_add_(0, row.long(), mask.float()).long().tolist()
            total = torch.zeros(len(number), dtype=torch.float64).index_add_(0, row.long(), own)
            importance[group] = (total / number.clamp_min(1)).tolist()
        self.plan.emit(RankChanged(
            step=step, rows=row_name, ranks=ranks, importance=importance, parameters=int(numbers[kept].sum()),
            budget=round(allowed * float(numbers.sum())), residual=max(pool.terms.residual() for pool in self.pools)))

    # ---- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Averages, previous scores, counters; masks are in the deltas."""
        return {"step": self.step, "decisions": self.decisions, "compact": self.compact, "previous": self.previous,
                "initial": self.initial, "target": None if self.policy is None else self.policy.target,
                "importance": None if self.importance is None else self.importance.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.step, self.decisions, self.compact = state["step"], state["decisions"], state["compact"]
        self.previous, self.initial = state["previous"], state["initial"]
        if self.policy is not None and self.plan.on_demand:
            self.policy = replace(self.policy, target=state["target"])
        if self.policy is None or state["importance"] is None:
            self.importance = None
            return
        self.importance = self._importance(self.policy)
        self.importance.load_state_dict(state["importance"])


def _round_robin(pool: Pool) -> Tensor:
    """(E,) float64: the place of each component among those of its row, so that every row has a first one."""
    row = pool.row().cpu()
    order = torch.zeros(len(row), dtype=torch.float64)
    for value in row.unique():
        order[row == value] = torch.arange(int((row == value).sum()), dtype=torch.float64)
    return order


def group_names(sites: Sequence[Site]) -> dict[Site, str]:
    """The group that each site is shown in: role and shape, and its place in the block where a block has several such."""
    names = {site: f"{site.role} {site.d_out}x{site.d_in}" for site in sites}
    counts = Counter((names[site], site.layer) for site in sites)
    several = {name for (name, _), count in counts.items() if count > 1}
    return {site: f"{name} {site.stack} {site.path.removeprefix(f'{site.stack}.{site.layer}.')}" if name in several else name
            for site, name in names.items()}


def silence_rows(parameter: nn.Parameter, mask: Tensor, axis: int = 0) -> None:
    """Set the rows of masked components to zero."""
    shape = [1] * parameter.ndim
    shape[axis] = -1
    with torch.no_grad():
        parameter.mul_(mask.to(parameter).view(shape))
