"""Auto: components of several methods compete for one budget while training; what stays is a plain list of methods.

    stay = the components of all candidates with the best score / cost, within a budget that falls from all to b(T)
    score of a component = sum over its numbers w of s(w),   s = smoothness * uncertainty of |w g|;   cost = how many numbers

Candidates are attached side by side, small: rank-one terms of low-rank changes, units of bottlenecks, tokens of prefixes, biases.
Any method that says how its deltas fall apart can be one. Importance, schedule and rules are those of the adaptive ranks (Zhang
et al. 2023, AdaLoRA, arXiv 2303.10512), extended to other components with sums in the place of means, so that score per cost is
the mean over a component's numbers whatever tensors these lie in. Choosing by one importance pass with masks instead of a bilevel
search or many runs follows S3Delta (Hu et al. 2022) and AutoPEFT (Zhou et al. 2024) in aim, not in means.

After the last decision what was dropped is removed, and at the end of the run the delta becomes the methods that are left, each
with its sizes (docs/auto.md). Candidates share one learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from deltaloom.allocation import Schedule
from deltaloom.compact.face import parameter_count
from deltaloom.deltas._adaptive import Policy, Pool, RankController, check_shares, group_names
from deltaloom.deltas._choice import ChosenDelta, ChosenPrefix, ChosenRows, Part, chosen
from deltaloom.deltas.base import (
    AttachContext,
    Attachment,
    Controller,
    Method,
    Outcome,
    StepPlan,
    method_from,
    method_record,
    methods_offered,
    shapes_at,
)
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.sites import Kind, Site

OWN = "candidates"  # the word for each candidate's own targets


class Auto(Method):
    """A choice among components of several methods within a budget."""

    name: ClassVar[str] = "auto"
    kinds: ClassVar[tuple[Kind, ...]] = get_args(Kind)

    targets: str | tuple[str, ...] = OWN
    """Which sites; `candidates`: those that each candidate names itself."""
    budget: str = "0.25%"
    """Trained numbers at the end: a count, or a share of the model's parameters such as 0.25%."""
    candidates: tuple[dict[str, Any], ...] = Field((), validate_default=True)
    """Methods to choose from, as entries of `deltas`; none given: every method that offers itself."""
    start: float = Field(0.1, ge=0, lt=1)
    """Share of the run before the first decision."""
    end: float = Field(0.4, ge=0, lt=1)
    """Share of the run after the last decision."""
    every: int | None = Field(None, ge=1)
    """Optimizer steps between decisions; a two-hundredth of the run, and at least 10, if not given."""
    importance: Literal["weight-gradient", "gradient"] = "weight-gradient"
    """What smoothness and uncertainty are taken of: |w g| of each number and its gradient, or |g|."""
    beta1: float = Field(0.85, ge=0, lt=1)
    """Weight of the past in the smoothness."""
    beta2: float = Field(0.85, ge=0, lt=1)
    """Weight of the past in the uncertainty."""

    @field_validator("budget", mode="before")
    @classmethod
    def _check_budget(cls, budget: object) -> object:
        """A count becomes a text too: whole numbers in the settings of a file are taken for sizes, and this is none."""
        text = str(budget) if isinstance(budget, int) else budget
        if isinstance(text, str):
            _count(text, 1)
        return text

    @field_validator("candidates")
    @classmethod
    def _complete(cls, records: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        """Each with all its settings; without any, every method that offers itself."""
        if any(record.get("method") == cls.name for record in records):
            raise ValueError("a choice cannot be a candidate of itself")
        try:
            methods = [method_from(record, f"candidates.{index}") for index, record in enumerate(records)] or methods_offered()
        except SettingsError as error:
            raise ValueError(str(error)) from None
        return tuple(method_record(method) for method in methods)

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        check_shares(self.start, self.end)
        return self

    def members(self) -> list[Method]:
        """The candidates, at the sites that are asked for here; branches last, as what ends there sees all that a layer says."""
        given = {"targets": None if self.targets == OWN else self.targets, "layers": self.layers}
        given = {key: value for key, value in given.items() if value is not None}
        found = [method_from(record | given, f"candidates.{index}") for index, record in enumerate(self.candidates)]
        return sorted(found, key=lambda method: method.kinds == ("branch",))

    def sites(self, model: nn.Module) -> list[Site]:
        """Those of all candidates."""
        return list(dict.fromkeys(site for method in self.members() for site in method.sites(model)))

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """All candidates' deltas side by side.

        Raises:
            RefusedError: a candidate that does not fall apart into components.
            SettingsError: a budget below the smallest component, or in which all of them fit.
        """
        parts: dict[Site, dict[str, Part]] = {}
        wanted = set(sites)
        for index, method in enumerate(self.members()):
            own = [site for site in method.sites(context.model) if site in wanted]
            made = method.attach(own, context)
            if made.shared or set(made.deltas) != set(own):
                raise RefusedError(f"the deltas of '{method.name}' hang together, so that no single one can be dropped")
            for site, delta in made.deltas.items():
                parts.setdefault(site, {})[str(index)] = Part(delta, method.components(delta))
        ordered = sorted(parts, key=lambda site: site.kind == "branch")
        attachment = Attachment({site: chosen(parts[site]) for site in ordered})
        total = parameter_count(context.model)
        if not context.loading:
            self._check_room(attachment, total)
        for _, _, part in _parts(attachment):
            part.budget = self.numbers(total)
        return attachment

    def numbers(self, model_parameters: int) -> int:
        """The budget as a count."""
        return _count(self.budget, model_parameters)

    def _check_room(self, attachment: Attachment, model_parameters: int) -> None:
        budget = self.numbers(model_parameters)
        costs = [part.numbers() for _, _, part in _parts(attachment)]
        smallest, total = min(float(own.min()) for own in costs), sum(float(own.sum()) for own in costs)
        got = f"{budget:,} numbers" + (f" ({self.budget} of {model_parameters:,})" if "%" in self.budget else "")
        if budget < smallest:
            raise SettingsError(f"{self.name}: the budget is too small to keep anything", got=got,
                                legal=f"at least {smallest:,.0f}, the smallest component", hint="Raise the budget.")
        if budget >= total:
            raise SettingsError(f"{self.name}: the budget holds all candidates at once, so that there is nothing to choose",
                                got=got, legal=f"less than {total:,.0f}, which all candidates have together",
                                hint="Lower the budget, raise the candidates' sizes, or write the list of methods out.")

    def controller(self, attachment: Attachment, plan: StepPlan) -> Controller | None:
        """All components under one budget, counted in numbers.

        Raises:
            SettingsError: a strategy wants to grow what has a budget of its own.
        """
        if plan.on_demand:
            raise SettingsError(f"'{self.name}' has a budget, and a strategy that grows ranks has another", got="both",
                                hint="Write strategy.grow: false, or take a method with adaptive ranks.")
        names, methods = group_names(list(attachment.deltas)), self.members()
        pools = [Pool(part, f"{methods[index].name} {names[site]}", _row(part, site.layer or 0))
                 for site, index, part in _parts(attachment)]
        schedule = Schedule.of_run(plan.total_steps, self.start, self.end, self.every)
        budget = next(part.budget for _, _, part in _parts(attachment))
        policy = Policy("budget", self.importance, self.beta1, self.beta2, schedule, budget, "layer", "sum", True)
        return RankController(pools, policy, plan)

    def fit(self, attachment: Attachment, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """What the saved tensors have kept of each candidate."""
        for site, index, part in _parts(attachment):
            part.fit(shapes_at(shapes, f"{site.name}:parts.{index}."))

    def settled_as(self, attachment: Attachment) -> tuple[Outcome, ...] | None:
        """Each candidate with what it kept: one entry for all sites where it has the same settings now."""
        found: list[Outcome] = []
        for index, method in enumerate(self.members()):
            left = {site: part for site, own, part in _parts(attachment) if own == index}
            groups: list[tuple[dict[str, Any], list[Site]]] = []
            for site, part in left.items():
                count = int(part.mask.sum())
                settings = method.resized(site, count)
                group = next((sites for known, sites in groups if known == settings), None)
                if count and group is None:
                    groups.append((settings, [site]))
                elif count and group is not None:
                    group.append(site)
            for settings, sites in groups:
                if set(sites) != set(left):
                    settings = settings | {"targets": [site.name for site in sites], "layers": None}
                plain = method_from(method_record(method) | settings, self.name)
                found.append(Outcome(plain, {site.name: left[site].state() for site in sites}))
        return tuple(found)


def _parts(attachment: Attachment) -> Iterator[tuple[Site, int, Part]]:
    """(site, number of the candidate, part) of all."""
    for site, delta in attachment.deltas.items():
        if isinstance(delta, ChosenDelta | ChosenPrefix | ChosenRows):
            for key, part in delta.parts.items():
                if isinstance(part, Part):
                    yield site, int(key), part


def _row(part: Part, layer: int) -> Callable[[], Tensor]:
    return lambda: torch.full((len(part.mask),), layer)


def _count(budget: str, model_parameters: int) -> int:
    """200000 from "200000", and so many of the model's parameters from "0.25%"; raises ValueError."""
    number, share, rest = budget.strip().partition("%")
    if not share and number.isascii() and number.isdigit() and int(number) > 0:
        return int(number)
    try:
        part = float(number) / 100 if share else math.nan
    except ValueError:
        part = math.nan
    if rest or not 0 < part <= 1:
        raise ValueError("a budget is a count of at least one, such as 200000, or a share of the model's parameters, such as "
                         "0.25%, at most 100%")
    return int(part * model_parameters)
