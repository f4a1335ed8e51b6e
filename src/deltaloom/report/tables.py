"""The plain tables that a run folder's facts are put into; the page, the comparison and the card read only these."""

from __future__ import annotations

from dataclasses import dataclass

from deltaloom.report.text import measured, signed

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Metric:
    """One metric before and after tuning; `low`, `high`: 95% interval; `majority`: what the most frequent answer alone gets."""

    name: str
    value: float | None
    base: float | None = None
    low: float | None = None
    high: float | None = None
    majority: float | None = None
    higher_is_better: bool = True

    @property
    def gain(self) -> float | None:
        """After minus before."""
        return None if self.value is None or self.base is None else self.value - self.base

    @property
    def better(self) -> bool | None:
        """Whether tuning improved it; None if unknown or unchanged."""
        return None if not self.gain else (self.gain > 0) == self.higher_is_better

    @property
    def text(self) -> str:
        """Before, after and gain on one line."""
        if self.base is None:
            return measured(self.value)
        return f"{measured(self.base)} \u2192 {measured(self.value)} ({signed(self.gain)})"


@dataclass(frozen=True)
class ClassRow:
    """One class's precision, recall and F1, how many rows it has, and the bounds of its F1 if known."""

    label: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class SiteRow:
    """What one method matched with one target pattern."""

    method: str
    target: str
    sites: int | None
    parameters: int | None
    examples: str


@dataclass(frozen=True)
class FirstRow:
    """A training row as the model sees it: its text in parts, each with whether it is learned; `target` if not in the text."""

    where: str
    tokens: int | None
    segments: tuple[tuple[str, bool], ...]
    target: str = ""


@dataclass(frozen=True)
class DataFacts:
    """The data's facts: what was found, how long the texts are, and everything that was counted.

    `labels`: name, training rows, evaluation rows (None if unknown); `label_order`: the model's order of them.
    """

    format: str = ""
    rows: int | None = None
    eval_rows: int | None = None
    labels: tuple[tuple[str, int, int | None], ...] = ()
    label_order: tuple[str, ...] = ()
    lengths: tuple[tuple[str, str], ...] = ()
    others: tuple[tuple[str, str], ...] = ()
    first_rows: tuple[FirstRow, ...] = ()


@dataclass(frozen=True)
class WarningRow:
    """All warnings of one kind."""

    kind: str
    messages: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class Sample:
    """One evaluation row before and after."""

    row: str
    input: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True)
class Moment:
    """Something on the run's timeline: it started, somebody acted, a checkpoint was written, it ended."""

    step: int | None
    what: str
    detail: str


@dataclass(frozen=True)
class UsageRow:
    """How some evaluation rows share the entries of a choice by the input text; `by` is all, label or file."""

    by: str
    name: str
    rows: int
    shares: tuple[float, ...]


@dataclass(frozen=True)
class RankGroup:
    """A group of layers while a controller changed its ranks: `ranks[change][row]`, `importance[change][row]`; None: unknown."""

    name: str
    ranks: tuple[tuple[int | None, ...], ...]
    importance: tuple[tuple[float | None, ...], ...]

    @property
    def totals(self) -> tuple[int | None, int | None]:
        """The sum of the rows' ranks at the first and at the last change that knows any."""
        sums = [sum(rank for rank in row if rank is not None) for row in self.ranks if any(rank is not None for rank in row)]
        return (sums[0], sums[-1]) if sums else (None, None)


@dataclass(frozen=True)
class RankHistory:
    """What one controller decided: its groups at each of `steps`, and what it kept of what was allowed, in parameters.

    `rows`: what a row of a group is (layer, frequency); `residual`: of the factors that are kept orthonormal.
    """

    rows: str
    steps: tuple[int, ...]
    groups: tuple[RankGroup, ...]
    parameters: Points = ()
    budget: Points = ()
    residual: Points = ()


@dataclass(frozen=True)
class DepthRow:
    """How much the changes of a group of layers resemble one another, from the saved delta's record."""

    method: str
    role: str
    shape: str
    layers: int
    ranks: tuple[int, ...]
    rho: float | None
    residual: float | None


@dataclass(frozen=True)
class Privacy:
    """What a party's guards promised: lines of the account as text, the delta of their epsilons, and what is not promised."""

    promised: bool
    delta: float | None
    rows: tuple[tuple[str, ...], ...]
    unpromised: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """One resolved setting; `origin` is file, flag or default, or empty if the run file does not say."""

    key: str
    value: str
    origin: str


@dataclass(frozen=True)
class Sizes:
    """The run's figures, as product.md defines them; None where a file does not have them."""

    trainable_parameters: int | None = None
    final_parameters: int | None = None
    head_parameters: int | None = None
    total_parameters: int | None = None
    delta_bytes: int | None = None
    flops_per_token: float | None = None
    seconds: float | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None

    @property
    def trainable_share(self) -> float | None:
        """Delta parameters over the model's."""
        if self.trainable_parameters is None or not self.total_parameters:
            return None
        return self.trainable_parameters / self.total_parameters


@dataclass(frozen=True)
class RunFacts:
    """Everything that the page, the comparison and the card say about one run."""

    name: str
    task: str
    model: str
    methods: tuple[str, ...]
    status: str
    metrics: tuple[Metric, ...]
    primary: Metric | None
    sizes: Sizes
    curves: dict[str, Points]
    evaluations: dict[str, Points]
    best_step: int | None
    classes: tuple[ClassRow, ...]
    sites: tuple[SiteRow, ...]
    data: DataFacts
    warnings: tuple[WarningRow, ...]
    samples: tuple[Sample, ...]
    timeline: tuple[Moment, ...]
    ranks: tuple[RankHistory, ...]
    depth: tuple[DepthRow, ...]
    settings: tuple[Setting, ...]
    environment: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    privacy: Privacy | None = None
    usage: tuple[tuple[UsageRow, ...], ...] = ()  # one table for each choice by the input text

    def setting(self, key: str) -> str:
        """The value of one setting as text, or nothing."""
        return next((setting.value for setting in self.settings if setting.key == key), "")
