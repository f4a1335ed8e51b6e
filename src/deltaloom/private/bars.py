"""The bars that say what private tuning is worth, each as metrics on held-out rows.

    base            the model as it is
    emulator        the emulator as it is
    emulator_tuned  the front's deltas, tuned on the emulator
    plugged_in      those, in the model
    split_tuned     after split tuning in joint rounds
    own:PARTY       after split tuning of one party alone
    central_front   the same deltas, from the same values, tuned with all rows in one place
    central_all     the methods on all blocks, tuned with all rows in one place

`emulator_tuned` is what the parties have before the owner's model takes part: the mean of their deltas by rows.
What the owner protects is plugged_in minus emulator_tuned; what the split costs is central_all minus split_tuned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaloom.data.batches import Batch
from deltaloom.data.encode import Example
from deltaloom.data.rows import Row
from deltaloom.deltas.base import Method
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.evaluate.base import Task
from deltaloom.events import Emitter
from deltaloom.private.back import Back
from deltaloom.private.cut import Half, Holder, split, tensors_of
from deltaloom.private.front import FrontModel, Labels, Learner
from deltaloom.private.local import LocalChannel
from deltaloom.private.means.base import Mean, Weighed
from deltaloom.private.means.weighted import Weighted
from deltaloom.private.messages import Channel, Guard
from deltaloom.private.remote import RemoteBack
from deltaloom.settings import Settings
from deltaloom.train import run as train_run
from deltaloom.train.feed import ExampleFeed, Feed
from deltaloom.train.loop import train
from deltaloom.train.settings import TrainSettings
from deltaloom.tuned import Tuned, attach, restore
from deltaloom.tuned.saved import SavedDelta

Scores = dict[str, dict[str, float]]  # metrics by the name of a held-out set
Connect = Callable[[str, Back], Channel]
WINDOW = 4  # micro-batches under way at once


@dataclass(frozen=True)
class Held:
    """Rows to score on, and what the task made of them."""

    examples: Sequence[Example]
    rows: Sequence[Row]


class BarSettings(Settings):
    """How the bars are measured."""

    cut: int = Field(ge=1)
    """Blocks in the front."""
    head: Holder = "owner"
    """Who holds the head; a new one is at the party, where it trains."""
    labels: Labels = "owner"
    """Where the loss is computed."""
    rounds: int = Field(1, ge=1)
    """Joint rounds of split tuning."""
    emulate: TrainSettings
    """Each party's training on the emulator."""
    tune: TrainSettings
    """Each party's split training in one round."""
    central: TrainSettings
    """Training with all rows in one place: as long as all rounds together."""
    seed: int = 0
    """Of initial values and of the order of rows."""

    @model_validator(mode="after")
    def _check_head(self) -> BarSettings:
        if self.head == "party" and self.labels == "owner":
            raise ValueError("an owner without the head cannot compute a loss: head: party needs labels: home")
        return self


@dataclass(frozen=True)
class Measured:
    """The bars, and what each party did: rows it has, samples it used in split tuning."""

    bars: dict[str, Scores]
    parties: dict[str, dict[str, int]]
    common: SavedDelta


@dataclass(frozen=True)
class Comparison:
    """What all bars share. `methods` as written for the whole model; `heads` are what the task adds for a new head."""

    task: Task
    parties: Mapping[str, Sequence[Example]]
    held: Mapping[str, Held]
    methods: Sequence[Method]
    settings: BarSettings
    heads: Sequence[Method] = ()
    mean: Mean = field(default_factory=Weighted)
    guards: Mapping[str, Sequence[Guard]] | None = None
    connect: Connect | None = None
    emit: Emitter | None = None
    say: Callable[[str], None] = print

    def scores(self, model: nn.Module) -> Scores:
        """Metrics on every held-out set."""
        return {name: self.task.metrics(self.task.predict_all(model, each.examples), each.rows)
                for name, each in self.held.items()}

    def feed(self, examples: Sequence[Example], settings: TrainSettings, turn: int = 0) -> CountingFeed:
        """Training rows; each round has its own order."""
        collate = self.task.pack if settings.packing else self.task.collate
        return CountingFeed(ExampleFeed(examples, collate, settings, seed=self.settings.seed + turn))

    def run(self, tuned: Tuned, learner: train_run.Learner, feed: Feed, settings: TrainSettings, turn: int = 0,
            **options: Any) -> int:
        """One training run of the loop; gives back its steps."""
        return train(tuned, learner, feed, settings=settings, emit=self.emit, seed=self.settings.seed + turn, **options).step


class CountingFeed:
    """A feed that counts the rows that it gave out: the weight of a party's update."""

    def __init__(self, feed: ExampleFeed) -> None:
        self.feed = feed
        self.used = 0

    def steps(self, epoch: int) -> Sequence[Sequence[Sequence[int]]]:
        """Those of the feed."""
        return self.feed.steps(epoch)

    def dealt(self, step: Sequence[Sequence[int]], number: int, size: int) -> Sequence[Sequence[int]]:
        """That of the feed."""
        return self.feed.dealt(step, number, size)

    def batch(self, indices: Sequence[int], device: torch.device) -> Batch:
        """That of the feed."""
        self.used += len(indices)
        return self.feed.batch(indices, device)

    def place(self, row: int) -> str:
        """That of the feed."""
        return self.feed.place(row)


def measure(model: PreTrainedModel, emulator: PreTrainedModel, comparison: Comparison) -> Measured:
    """All bars of a model, an emulator of it, and parties. The models end as they began; the back never trains.

    Raises:
        RefusedError: the emulator's front is not the model's, bit for bit; a new head that is not at the party.
    """
    settings, task = comparison.settings, comparison.task
    if comparison.heads and settings.head == "owner":
        raise RefusedError("a head that trains must be at the party, because the owner's side never trains", got="head: owner",
                           legal="head: party with labels: home")
    check_emulator(model, emulator, settings.cut)
    front, back = split(model, task.name, settings.cut, head=settings.head)
    methods = [on_front(method, front) for method in comparison.methods]
    bars: dict[str, Scores] = {}

    def note(name: str, scores: Scores) -> None:
        bars[name] = scores
        first = next(iter(scores.values()))
        comparison.say(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in first.items()))

    note("base", comparison.scores(model))
    note("emulator", comparison.scores(emulator))
    with_emulator = attach(emulator, methods, heads=comparison.heads, tokenizer=task.tokenizer, seed=settings.seed)
    emulated = emulate(with_emulator, comparison)
    note("emulator_tuned", comparison.scores(with_emulator))
    with_emulator.detach()
    plugged = restore(model, emulated)
    note("plugged_in", comparison.scores(plugged))
    plugged.detach()
    together, parties = tune_split(front, back, emulated, comparison, list(comparison.parties), note, "split_tuned")
    for party in comparison.parties:
        tune_split(front, back, emulated, comparison, [party], note, f"own:{party}")
    everything = [example for examples in comparison.parties.values() for example in examples]
    central = restore(model, emulated)
    note("central_front", _central(central, everything, comparison))
    central = attach(model, comparison.methods, heads=comparison.heads, tokenizer=task.tokenizer, seed=settings.seed)
    note("central_all", _central(central, everything, comparison))
    return Measured(bars, parties, together)


def emulate(tuned: Tuned, comparison: Comparison) -> SavedDelta:
    """Step 2 at every party, from the same initial values; what is tuned ends with the mean by rows, which is given back."""
    settings = comparison.settings
    start = _copied(tuned.delta_state())
    updates = []
    for examples in comparison.parties.values():
        tuned.load_delta_state(start)
        feed = comparison.feed(examples, settings.emulate)
        comparison.run(tuned, comparison.task, feed, settings.emulate)
        updates.append(Weighed(_wide(tuned.delta_state()), feed.used))
    return _take(tuned, comparison.mean.combine(updates))


def tune_split(front: Half, back: Half, start: SavedDelta, comparison: Comparison, parties: Sequence[str],
               note: Callable[[str, Scores], None], name: str) -> tuple[SavedDelta, dict[str, dict[str, int]]]:
    """Steps 4 and 5: split tuning in joint rounds from common values, and its bar; the common delta and what each party did."""
    settings = comparison.settings
    tuned = restore(front.model, start)
    owner = Back(back)
    connect = comparison.connect or (lambda party, serving: LocalChannel(serving, party, window=WINDOW))
    channels = {party: connect(party, owner) for party in parties}
    guards = comparison.guards or {}
    models = {party: FrontModel(tuned, front, RemoteBack(channel, front, guards.get(party, ())), settings.labels)
              for party, channel in channels.items()}
    facts = {party: {"rows": len(comparison.parties[party]), "samples": 0, "steps": 0} for party in parties}
    try:
        common = _copied(tuned.delta_state())
        for turn in range(settings.rounds):
            updates = []
            for party, model in models.items():
                tuned.load_delta_state(common)
                feed, done = comparison.feed(comparison.parties[party], settings.tune, turn), facts[party]["steps"]
                steps = comparison.run(tuned, Learner(comparison.task, model), feed, settings.tune, turn,
                                       ahead=channels[party].window, before_step=_counting_on(model.remote, done))
                facts[party]["steps"] += steps
                facts[party]["samples"] += feed.used
                updates.append(Weighed(_wide(tuned.delta_state()), feed.used))
            common = _copied(_take(tuned, comparison.mean.combine(updates)).state)
        note(name, comparison.scores(next(iter(models.values()))))
        saved = tuned.saved()
        return replace(saved, state=_copied(saved.state)), facts
    finally:
        for channel in channels.values():
            channel.close()
        tuned.detach()


def on_front(method: Method, front: Half) -> Method:
    """The method on the blocks of the front alone, whatever the model that carries them.

    Raises:
        TargetError: its targets match nothing there. SettingsError: it has no targets that could be restricted.
    """
    if "targets" not in type(method).model_fields:
        raise SettingsError("this method cannot be kept to the blocks of the front", got=method.name)
    paths = tuple("re:" + re.escape(site.name) for site in method.sites(front.model) if site.layer is not None)
    return type(method)(**{**method.given(), "targets": paths})


def check_emulator(model: PreTrainedModel, emulator: PreTrainedModel, cut: int) -> None:
    """That tokens, embeddings and the first `cut` blocks of an emulator are the model's, bit for bit.

    Raises:
        RefusedError: names the tensors that are not.
    """
    ours, theirs = (tensors_of(each, "front", cut, "owner") for each in (model, emulator))
    problems = [f"missing in the emulator: {name}" for name in ours if name not in theirs]
    problems += [f"other values: {name}" for name, tensor in ours.items() if name in theirs and not _same(tensor, theirs[name])]
    if problems:
        raise RefusedError("the emulator's front is not the model's, so that nothing tuned on it could be plugged in",
                           problems=problems[:20], hint="Make the emulator with --keep-first of at least the cut.")


def _central(tuned: Tuned, examples: Sequence[Example], comparison: Comparison) -> Scores:
    settings = comparison.settings.central
    comparison.run(tuned, comparison.task, comparison.feed(examples, settings), settings)
    scores = comparison.scores(tuned)
    tuned.detach()
    return scores


def _counting_on(remote: RemoteBack, done: int) -> Callable[[int], None]:
    """Steps of the owner's view: they go on from round to round, although each round is a run of the loop."""
    return lambda step: remote.begin(done + step)


def _take(tuned: Tuned, mean: Mapping[str, Tensor]) -> SavedDelta:
    own = tuned.delta_state()
    tuned.load_delta_state({name: tensor.to(own[name].dtype) for name, tensor in mean.items()})
    saved = tuned.saved()
    return replace(saved, state=_copied(saved.state))


def _wide(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(torch.float64, copy=True) for name, tensor in state.items()}


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
