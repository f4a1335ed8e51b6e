"""What the tests of private tuning share: toy models that are cut, tasks over toy rows, split and unsplit runs of one loop."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltaloom import attention
from deltaloom.data.encode import Example
from deltaloom.data.labels import LabelMap
from deltaloom.data.settings import DataSettings
from deltaloom.deltas.base import Method
from deltaloom.deltas.full import Full
from deltaloom.deltas.prefix import Prefix
from deltaloom.evaluate.base import Targets, Task
from deltaloom.evaluate.causal_lm import CausalLM
from deltaloom.evaluate.sequence_classification import SequenceClassification
from deltaloom.events import Emitter, Event
from deltaloom.private.back import Back
from deltaloom.private.cut import Half, split
from deltaloom.private.front import FrontModel, Learner
from deltaloom.private.local import LocalChannel
from deltaloom.private.remote import RemoteBack
from deltaloom.sites import head_paths
from deltaloom.train.feed import ExampleFeed
from deltaloom.train.loop import train
from deltaloom.train.settings import TrainSettings
from deltaloom.tuned import Tuned, attach
from tests.toy_tokenizers import byte_level
from tests.toys import toy

CAUSAL = ("llama", "gpt2", "qwen3", "gemma", "phi", "phi3")
CLASSES = ("bert", "roberta", "distilbert", "llama-classifier")
PREFIX = Prefix(length=3, init="random")


def is_causal(layout: str) -> bool:
    return layout in CAUSAL


def task_name(layout: str) -> str:
    return "causal-lm" if is_causal(layout) else "sequence-classification"


def three_blocks(layout: str, seed: int = 0) -> nn.Module:
    """A toy of the layout, in our attention."""
    model = toy(layout, seed)
    if layout == "llama-classifier":
        model.config.pad_token_id = byte_level().pad_token_id  # as loading settles it
    attention.install(model)
    return model


def examples(layout: str, count: int = 12, seed: int = 0) -> list[Example]:
    """Rows of unequal length: some tokens learned, or one of three classes."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for row in range(count):
        length = int(torch.randint(4, 12, (), generator=generator))
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        labels: Any = [-100, -100, *ids[2:]] if is_causal(layout) else row % 3
        found.append(Example(row, ids, labels, length))
    return found


def task_for(layout: str, model: nn.Module, weights: tuple[float, ...] | None = None) -> Task:
    kind = CausalLM if is_causal(layout) else SequenceClassification
    targets = Targets() if is_causal(layout) else Targets(LabelMap(("a", "b", "c")), weights)
    return kind(DataSettings(train="rows.jsonl", max_length=32), targets, model.config, tokenizer=byte_level())


def head_of(layout: str, model: nn.Module) -> list[Method]:
    """Full tuning of the classifier's own layers, as the job adds it."""
    return [] if is_causal(layout) else [Full(targets=tuple(head_paths(model)))]


def settings_for(packing: bool = False, **values: Any) -> TrainSettings:
    plain = {"batch_size": 6, "max_steps": 3, "learning_rate": 0.05, "packing": packing, "precision": "fp32"}
    return TrainSettings(**(plain | values))


def feed_for(task: Task, rows: Sequence[Example], settings: TrainSettings, micro_tokens: int = 24) -> ExampleFeed:
    return ExampleFeed(rows, task.pack if settings.packing else task.collate, settings, seed=1, micro_tokens=micro_tokens)


@dataclass
class Ran:
    """What a run left."""

    tuned: Tuned
    state: dict[str, torch.Tensor]
    losses: list[float]
    model: nn.Module  # for predictions: the tuned model, or the front with the back behind it


def recorded() -> tuple[Emitter, list[Event]]:
    events: list[Event] = []
    return Emitter([events.append]), events


def losses_of(events: Sequence[Event]) -> list[float]:
    return [event.loss for event in events if type(event).__name__ == "Step"]


def run_whole(layout: str, model: nn.Module, methods: Sequence[Method], settings: TrainSettings, *, heads: bool,
              weights: tuple[float, ...] | None = None, seed: int = 0) -> Ran:
    """The unsplit model, trained by the loop."""
    task = task_for(layout, model, weights)
    tuned = attach(model, methods, heads=head_of(layout, model) if heads else (), seed=seed)
    emit, events = recorded()
    train(tuned, task, feed_for(task, examples(layout), settings), settings=settings, emit=emit, seed=0)
    return Ran(tuned, copy.deepcopy(tuned.delta_state()), losses_of(events), tuned)


def run_split(layout: str, model: nn.Module, methods: Sequence[Method], settings: TrainSettings, *, labels: str, head: str,
              cut: int = 1, window: int = 1, weights: tuple[float, ...] | None = None, seed: int = 0, guards: Sequence[Any] = (),
              back: Back | None = None, **channel: Any) -> Ran:
    """The same model cut in two, trained by the same loop over a channel in this process."""
    front, owner = split(model, task_name(layout), cut, head=head)
    back = back or Back(owner)
    return run_front(layout, front, LocalChannel(back, window=window, **channel), methods, settings, labels=labels,
                     weights=weights, seed=seed, guards=guards)


def run_front(layout: str, front: Half, channel: Any, methods: Sequence[Method], settings: TrainSettings, *, labels: str,
              weights: tuple[float, ...] | None = None, seed: int = 0, guards: Sequence[Any] = ()) -> Ran:
    task = task_for(layout, front.model, weights)
    heads = head_of(layout, front.model) if front.has_head else ()
    tuned = attach(front.model, methods, heads=heads, seed=seed)
    remote = RemoteBack(channel, front, guards, run="toy")
    whole = FrontModel(tuned, front, remote, labels)
    emit, events = recorded()
    train(tuned, Learner(task, whole), feed_for(task, examples(layout), settings), settings=settings, emit=emit, seed=0,
          ahead=channel.window, before_step=remote.begin)
    return Ran(tuned, copy.deepcopy(tuned.delta_state()), losses_of(events), whole)
