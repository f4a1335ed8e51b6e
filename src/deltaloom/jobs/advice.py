"""Rules of advice: small functions from facts of a run to proposals, each with its reason and the page that it rests on.

A rule proposes what a run file leaves out, and questions what it states only where a fact speaks against it. One that has nothing
to say says nothing. Where no page of ours measured what a rule rests on, its evidence says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

from deltaloom.data.batches import LEAST, WASTE, plan_steps
from deltaloom.data.settings import DataSettings
from deltaloom.deltas.base import method_record, methods_from
from deltaloom.deltas.measured import Choice, Rate, choice_for, measured_rate, published_rate, table
from deltaloom.errors import SettingsError
from deltaloom.report.text import count, figure
from deltaloom.train.feed import MICRO_TOKENS
from deltaloom.train.settings import TrainSettings

COUNTED = "counted from these rows"
DERIVED = "derived from how fast weights are read, not measured"
STOPPING = "docs/strategy.md; a rule of the field, not measured by us"
FEW_ROWS = 1000      # fewer were never measured at more than rank 1 with equal settings
FEWEST_STEPS = 60    # an epoch of E2E, the shortest run of ours that learned its task (docs/results/foundation.md), has 63
MOST_PASSES = 10
SKEWED = 0.8         # share of the commonest class from which accuracy says little
FEWEST_TO_SPLIT = 20
FAR = 3.0            # times beyond the rates that were tried, from which a stated one is questioned
STEP_ROWS = 16       # rows of an optimizer step where nothing is stated


@dataclass(frozen=True)
class Advice:
    """A proposal. `value` None: nothing to set, but to look at; `present`: what the run file states, None if nothing."""

    setting: str
    value: Any
    present: Any
    reason: str
    evidence: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Place:
    """A linear layer inside the blocks, or a part of one; `cost`: numbers of a change of rank 1 there."""

    name: str
    role: str
    layer: int
    cost: int


@dataclass(frozen=True)
class Facts:
    """What rules look at. `lengths` of training rows are tokens before anything is cut, `longest` is what the model takes.

    `unit`: numbers of a change of rank 1 on all linears of the blocks. `limit`: the budget in trained numbers. `stated_numbers`:
    trained numbers of the stated deltas, None where they change while training or none are stated. `unmergeable`: why these
    cannot be merged, empty if they can. `classes`: a row has one label, and the run is judged by accuracy.
    """

    rows: int
    lengths: Sequence[int]
    longest: int
    unit: int
    places: Sequence[Place]
    eval_rows: int = 0
    labels: Mapping[str, int] = field(default_factory=dict)
    duplicates: int = 0
    overlap: int = 0
    generates: bool = False
    classes: bool = False
    packable: bool = False
    on_cpu: bool = True
    limit: int | None = None
    stated_numbers: int | None = None
    merge: bool = False
    unmergeable: str = ""

    def sizes(self, draft: Draft) -> list[int]:
        """Tokens of the training rows as they are cut."""
        limit = min(draft.max_length, self.longest)
        return [min(size, limit) for size in self.lengths]


class Draft:
    """A run file's mapping, with what was proposed so far."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values: dict[str, Any] = deepcopy(dict(values))

    def get(self, setting: str) -> Any:
        """What stands there: `train.batch_size`; None where nothing does."""
        place: Any = self.values
        for key in setting.split("."):
            place = place.get(key) if isinstance(place, dict) else None
        return place

    def take(self, advice: Advice) -> None:
        """Write a proposal into it; one without a value is only to be read."""
        if advice.value is None:
            return
        *path, last = advice.setting.split(".")
        place = self.values
        for key in path:
            if not isinstance(place.get(key), dict):
                place[key] = {}
            place = place[key]
        place[last] = deepcopy(advice.value)

    def propose(self, setting: str, value: Any, reason: str, evidence: str) -> Advice:
        """A proposal for a setting of it."""
        return Advice(setting, value, self.get(setting), reason, evidence)

    @property
    def max_length(self) -> int:
        """Of the section `data`, or its default."""
        return int(self.get("data.max_length") or DataSettings.model_fields["max_length"].default)

    @property
    def watched(self) -> bool:
        """Whether there are rows to evaluate on."""
        return self.get("data.eval") is not None or self.get("data.eval_fraction") is not None

    @property
    def train(self) -> TrainSettings:
        """Its section `train`, with all defaults."""
        return TrainSettings.parse(self.values.get("train", {}), "train")


Rule = Callable[[Facts, Draft], Iterator[Advice]]


def duplicates(facts: Facts, draft: Draft) -> Iterator[Advice]:
    """Rows that say nothing new."""
    if facts.duplicates:
        yield draft.propose("data.train", None, f"{count(facts.duplicates)} of {count(facts.rows)} training rows repeat an "
                            "earlier one exactly: they count several times, and take time; take them out", COUNTED)


def leak(facts: Facts, draft: Draft) -> Iterator[Advice]:
    """Evaluation rows that were trained on."""
    if facts.overlap:
        yield draft.propose("data.eval", None, f"{count(facts.overlap)} of {count(facts.eval_rows)} evaluation rows have the "
                            "input of a training row (a leak): metrics flatter; take them out", COUNTED)


def held_out(facts: Facts, draft: Draft) -> Iterator[Advice]:
    """Something to judge by."""
    if not draft.watched and facts.rows >= FEWEST_TO_SPLIT:
        yield draft.propose("data.eval_fraction", 0.1, "without evaluation rows nothing says whether the run did any good; rows "
                            "with equal inputs stay on one side", "docs/strategy.md")


def length(facts: Facts, draft: Draft) -> Iterator[Advice]:
    """Nothing is cut that the model could take."""
    limit = min(draft.max_length, facts.longest)
    cut = sum(size > limit for size in facts.lengths)
    wanted = min(facts.longest, 16 * math.ceil(max(facts.lengths, default=0) / 16))
    if cut and wanted > limit:
        left = sum(size > wanted for size in facts.lengths)
        yield draft.propose("data.max_length", wanted, f"{count(cut)} of {count(facts.rows)} training rows have more than "
                            f"{limit} tokens and are cut; the longest has {count(max(facts.lengths))}"
                            + (f", and {count(left)} are longer than the model takes" if left else ""), COUNTED)


def metric(facts: Facts, draft: Draft) -> Iterator[Advice]:
    """Accuracy says little where one class is nearly everything."""
    if not facts.classes or len(facts.labels) < 2 or draft.get("train.metric") or draft.get("strategy.target_metric"):
        return
    name, most = max(facts.labels.items(), key=lambda item: item[1])
    share = most / sum(facts.labels.values())
    if share >= SKEWED:
        yield draft.propose("train.metric", "macro_f1", f"{share:.0%} of the training rows are '{name}': always saying so would "
                            f"have that accuracy, and a macro F1 of {2 * share / (1 + share) / len(facts.labels):.2f}", COUNTED)


def method(facts: Facts, draft: Draft) -> Iterator[Advice]:
    """A method where none is stated, or where the stated one does not fit the budget or cannot be merged."""
    stated = draft.get("deltas")
    too_large = facts.limit is not None and (facts.stated_numbers or 0) > facts.limit
    if stated and not too_large and not (facts.merge and facts.unmergeable):
        return
    size = None if facts.limit is None else facts.limit / facts.unit
    few = facts.rows < FEW_ROWS and (size is None or size > 1)
    choice = choice_for(1.0 if few else size, generates=facts.generates)
    entry = _fitted(choice, facts, 1.0 if few else size)
    reason = choice.reason
    if few:
        reason += (f"; there are {count(facts.rows)} rows, and four times the parameters did a low-rank change no good already "
                   "with 6,920 (SST-2: 84.9 at rank 4); fewer than 1,000 were not measured")
    if facts.limit is not None:
        reason = f"the budget is {count(facts.limit)} numbers, {figure(size)} of what rank 1 on all linears has; {reason}"
    if stated and too_large:
        reason = f"the stated deltas have {count(facts.stated_numbers)} numbers; {reason}"
    elif stated:
        reason = f"the stated deltas cannot be merged ({facts.unmergeable}), those proposed can; {reason}"
    yield draft.propose("deltas", [entry], reason, choice.page)


def _fitted(choice: Choice, facts: Facts, size: float | None) -> dict[str, Any]:
    """The entry of `deltas` of a choice, as large as the budget allows and its measurements reach."""
    entry = dict(choice.delta)
    if choice.fit == "sites":
        return {**entry, "targets": _last_places(facts)}
    most = choice.most or 1
    rank = math.floor(most if size is None else min(most, size))
    if "alpha" in entry:
        entry["alpha"] = entry["alpha"] / entry["rank"] * rank
        entry["alpha"] = int(entry["alpha"]) if entry["alpha"].is_integer() else entry["alpha"]
    return {**entry, "rank": rank, "targets": "all-linear"}


def _last_places(facts: Facts) -> list[str]:
    """Values and queries, from the last block on, as many as the budget holds at rank 1; all linears where none are named so.

    Raises:
        SettingsError: not even one fits.
    """
    places = [place for place in facts.places if place.role in ("q", "v")] or list(facts.places)
    order = sorted(places, key=lambda place: (-place.layer, place.role != "v"))
    chosen, left = [], facts.limit or 0
    for place in order:
        if place.cost > left:
            break
        chosen.append(place.name)
        left -= place.cost
    if not chosen:
        raise SettingsError("the budget is too small for any method that was measured", got=f"{count(facts.limit)} numbers",
                            legal=f"at least {count(order[0].cost) if order else 'one number'}, a change of rank 1 of one layer",
                            hint="Raise budget.parameters, or state deltas of your own: `deltaloom methods bitfit` is smaller.")
    return chosen


def batch(facts: Facts, draft: Draft) -> Iterator[Advice]:
    """Enough tokens for a product to be worth its weights' way through memory."""
    train, mean = draft.train, sum(facts.sizes(draft)) / max(facts.rows, 1)
    if not facts.on_cpu or not mean:
        return
    if train.batch_tokens is not None:
        if train.batch_tokens < LEAST:
            yield draft.propose("train.batch_tokens", LEAST, f"on a CPU a micro-batch of fewer than {LEAST} tokens waits for the "
                                "weights more than it computes", DERIVED)
        return
    rows = train.rows_per_step or STEP_ROWS
    wanted = min(8 * math.ceil(LEAST / mean / 8), max(rows, facts.rows // 8))
    if rows * mean < LEAST and wanted > rows:
        yield draft.propose("train.batch_size", wanted, f"{rows} rows of {mean:.0f} tokens are {rows * mean:.0f} tokens a step; "
                            f"on a CPU a micro-batch of fewer than {LEAST} waits for the weights more than it computes", DERIVED)


def passes(facts: Facts, draft: Draft) -> Iterator[Advice]:
    """Several passes over few rows."""
    train = draft.train
    if train.epochs is not None or train.max_steps is not None or train.max_time is not None:
        return
    steps = _steps(facts, train)
    epochs = min(MOST_PASSES, math.ceil(FEWEST_STEPS / steps))
    if epochs > 1:
        yield draft.propose("train.epochs", epochs, f"one pass over {count(facts.rows)} rows is {steps} steps; the shortest run "
                            "of ours that learned its task had 63 (E2E). How many passes are best was not measured; that few "
                            "rows often get too few steps is known from Zhang et al. 2021 (arXiv 2006.05987)",
                            "docs/results/foundation.md")


def stopping(facts: Facts, draft: Draft) -> Iterator[Advice]:
    """What was best is kept where rows are seen often."""
    train = draft.train
    if not draft.watched or (train.epochs or 1) < 3 or draft.get("strategy") is not None:
        return
    reason = f"{train.epochs:g} passes over the same rows may fit them too closely"
    if draft.get("train.early_stop") is None:
        yield draft.propose("train.early_stop", {"patience": 3}, f"{reason}: three evaluations without a better one end the run",
                            STOPPING)
    if draft.get("train.restore_best") is None:
        yield draft.propose("train.restore_best", True, f"{reason}: the delta of the best evaluation is what stays", STOPPING)


def looks(facts: Facts, draft: Draft) -> Iterator[Advice]:
    """More than one evaluation of a long pass."""
    train = draft.train
    if draft.watched and train.eval_every is None and (train.epochs or 1) <= 1 and _steps(facts, train) >= 10 * FEWEST_STEPS:
        yield draft.propose("train.eval_every", 0.1, f"one pass is {count(_steps(facts, train))} steps, and evaluations come "
                            "after each pass: a run that goes wrong would be seen at its end only", "docs/strategy.md")


def packing(facts: Facts, draft: Draft) -> Iterator[Advice]:
    """No padding where rows of a batch are of unlike length."""
    train = draft.train
    if not facts.packable or draft.get("train.packing") is not None or not facts.rows:
        return
    sizes = facts.sizes(draft)
    steps = plan_steps(sizes, batch_size=train.rows_per_step, batch_tokens=train.batch_tokens, micro_tokens=MICRO_TOKENS)
    padded = sum(len(micro) * max(sizes[index] for index in micro) for step in steps for micro in step)
    share = 1 - sum(sizes) / padded
    if share > WASTE:
        yield draft.propose("train.packing", True, f"{share:.0%} of the tokens of a pass would be padding; packed rows have "
                            "none, and each still sees itself only: losses and gradients are those of separate rows", COUNTED)


def rate(facts: Facts, draft: Draft) -> Iterator[Advice]:
    """The measured learning rate of the methods, or a published one; a stated one only if it is far from all that were tried."""
    entries = [entry for entry in draft.get("deltas") or [] if "from" not in entry]
    records = [method_record(each) for each in methods_from(entries)]
    if not records or draft.train.optimizer != "adamw":
        return
    stated = draft.get("train.learning_rate")
    rows = [measured_rate(record, generates=facts.generates, size=_size(record, facts)) for record in records]
    known = [row for row in rows if row is not None]
    if known:
        row = min(known, key=lambda each: each.rate)
        if stated is None or not min(row.tried) / FAR <= stated <= FAR * max(row.tried):
            reason = _rate_reason(row, facts, len(records), len(records) - len(known))
            if stated is not None:
                reason = f"{stated:g} is far from all rates that were tried; {reason}"
            value = row.rate if len(known) == len(records) else min(row.rate, table().otherwise)
            yield draft.propose("train.learning_rate", value, reason, row.page)
        return
    others = [found for found in map(published_rate, records) if found is not None]
    if others and stated is None:
        found = min(others, key=lambda each: each.rate)
        yield draft.propose("train.learning_rate", found.rate, f"none of these methods' rates was measured by us; {found.rate:g} "
                            f"is from {found.source}", f"{found.source}; not measured by us")


def _rate_reason(row: Rate, facts: Facts, methods: int, unmeasured: int) -> str:
    tried = ", ".join(f"{each:g}" for each in row.tried)
    kind = " ".join(f"{key} {value}" for key, value in row.delta.items() if key not in ("method", "alpha"))
    scale = f" at scale {row.scale:g}" if row.scale is not None else ""
    found = (f"{row.rate:g} was the lowest of {tried} within a hundredth of the best loss" if len(row.tried) > 1
             else f"{row.rate:g} was used")
    reason = f"{row.method} {kind}".strip() + f"{scale}, on {row.on}: {found}" + (f" ({row.border})" if row.border else "")
    if row.generates != facts.generates:
        reason += "; tasks of this kind were not measured"
    if methods > 1:
        reason += "; combinations were not measured, so the lowest of their rates"
    if unmeasured:
        reason += f", with {table().otherwise:g} for methods that were not"
    return reason


def _size(record: Mapping[str, Any], facts: Facts) -> float | None:
    """How large an entry is, in the unit of the table, where it names its layers one by one."""
    costs = {place.name: place.cost for place in facts.places}
    targets, rank = record.get("targets"), record.get("rank")
    if isinstance(targets, str) or not rank or not targets or not all(target in costs for target in targets):
        return None
    return float(rank) * sum(costs[target] for target in targets) / facts.unit


def _steps(facts: Facts, train: TrainSettings) -> int:
    """Optimizer steps of one pass."""
    if train.batch_tokens is not None:
        return max(1, math.ceil(sum(facts.lengths) / train.batch_tokens))  # at least; cut rows make it fewer
    return max(1, math.ceil(facts.rows / (train.rows_per_step or STEP_ROWS)))


# In this order: a rule sees what those before it proposed.
RULES: tuple[Rule, ...] = (duplicates, leak, held_out, length, metric, method, batch, passes, stopping, looks, packing, rate)


def advised(facts: Facts, draft: Draft) -> list[Advice]:
    """What all rules propose; it stands in the draft afterwards."""
    found: list[Advice] = []
    for rule in RULES:
        for advice in rule(facts, draft):
            draft.take(advice)
            found.append(advice)
    return found
