"""Runs trained as a cohort are the runs trained one after another: tensors, figures, ends, and what becomes of errors."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from deltaloom import attention
from deltaloom.data.batches import collate
from deltaloom.data.encode import Example
from deltaloom.deltas.bitfit import BitFit
from deltaloom.deltas.bottleneck import Bottleneck
from deltaloom.deltas.dora import DoRA
from deltaloom.deltas.full import Full
from deltaloom.deltas.ia3 import IA3
from deltaloom.deltas.lora import LoRA
from deltaloom.deltas.prefix import Prefix
from deltaloom.deltas.prompt import Prompt
from deltaloom.errors import Interrupted, NonFiniteError
from deltaloom.events import Evaluated, Finished, Step, Warned
from deltaloom.kernels.dropout import Stream, by_streams
from deltaloom.train.cohort import Cohort
from deltaloom.train.feed import ExampleFeed
from deltaloom.train.loop import LOSS, Start, train
from deltaloom.train.settings import EarlyStop, TrainSettings
from deltaloom.train.state import seed_everything
from deltaloom.tuned import Tuned, attach
from tests.toys import toy
from tests.train.pieces import Log, ToyMethod, rows

KINDS = {"llama": "causal", "gpt2": "causal", "bert": "class", "t5": "seq2seq", "llama-classifier": "class"}


def shaky(layout: str, p: float = 0.1) -> nn.Module:
    """A toy whose own dropout is active when it trains."""
    model = toy(layout)
    attention.install(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
        if "attention_dropout" in vars(module) and isinstance(module.attention_dropout, float):
            module.attention_dropout = p
    return model


def examples(layout: str, count: int = 30) -> list[Example]:
    found = rows(count)
    if KINDS[layout] == "class":
        return [Example(each.row, each.input_ids, each.row % 3, each.length) for each in found]
    if KINDS[layout] == "seq2seq":
        generator = random.Random(5)
        answers = [[generator.randrange(3, 20) for _ in range(generator.randrange(2, 9))] for _ in found]
        return [Example(each.row, each.input_ids, answer, each.length + len(answer))
                for each, answer in zip(found, answers, strict=True)]
    return found


class Rows:
    """Losses by row, by the book."""

    def row_losses(self, model, batch):
        labels = batch.labels
        if labels.ndim == 1:
            losses = nn.functional.cross_entropy(model(**batch.inputs).logits, labels, reduction="none")
            return losses, torch.ones_like(losses)
        logits = model(**batch.inputs).logits
        if "decoder_input_ids" not in batch.inputs:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
        return losses.view(labels.shape).sum(1), (labels != -100).float().sum(1)

    def loss(self, model, batch):
        losses, counts = self.row_losses(model, batch)
        return losses.sum(), counts.sum()


@dataclass
class Spec:
    """One run; what is not said is as in the others."""

    methods: list[Any]
    settings: TrainSettings
    seed: int = 0
    heads: list[Any] = field(default_factory=list)
    evaluate: Any = None
    log: Log = field(default_factory=Log)

    def feed(self, layout: str) -> ExampleFeed:
        return ExampleFeed(examples(layout), partial(collate, pad_id=0, kind=KINDS[layout], decoder_start=0), self.settings,
                           seed=self.seed)


def settings(steps: int = 6, **more: Any) -> TrainSettings:
    return TrainSettings(**{"max_steps": steps, "batch_size": 4, "learning_rate": 1e-3} | more)


def run_alone(layout: str, spec: Spec, task: Any, model: nn.Module | None = None) -> tuple[dict[str, torch.Tensor], Any, Log]:
    log = Log()
    tuned = attach(model or shaky(layout), spec.methods, heads=spec.heads, seed=3)
    result = train(tuned, task, spec.feed(layout), settings=spec.settings, emit=log.emit, seed=spec.seed, evaluate=spec.evaluate)
    return tuned.delta_state(), result, log


def run_together(layout: str, specs: list[Spec], task: Any, model: nn.Module | None = None, slots: int = 99, room: int = 2048):
    """For each run its tensors, its result or error; a run begins when a slot is free."""
    tuned, waiting = Tuned(model or shaky(layout)), list(enumerate(specs))
    found: dict[int, Any] = {}
    with Cohort(tuned, task, room) as cohort:
        while waiting or cohort.members:
            while waiting and len(cohort.members) < slots:
                number, spec = waiting.pop(0)
                tuned.add(f"run-{number}", spec.methods, heads=spec.heads, seed=3)
                cohort.join(Start(tuned, task, spec.feed(layout), spec.settings, spec.log.emit, spec.seed, spec.evaluate, LOSS,
                                  None, None, None, {}), f"run-{number}")
            for each in cohort.step():
                found[int(each.member.lane.removeprefix("run-"))] = (copy.deepcopy(tuned.delta_state(each.member.lane)),
                                                                     each.outcome)
                tuned.remove(each.member.lane)
    return [found[number] for number in range(len(specs))]


def assert_same_runs(layout: str, specs: list[Spec], tolerance: float = 1e-6, **options: Any) -> None:
    task = Rows()
    together = run_together(layout, specs, task, **options)
    for spec, (state, outcome) in zip(specs, together, strict=True):
        if isinstance(outcome, Exception):
            raise outcome
        expected, result, log = run_alone(layout, spec, task)
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, atol=tolerance, rtol=tolerance, msg=lambda text, n=name: f"{n}: {text}")
        assert (outcome.step, outcome.reason, outcome.tokens) == (result.step, result.reason, result.tokens)
        for key, value in result.metrics.items():
            assert outcome.metrics[key] == pytest.approx(value, rel=tolerance, abs=tolerance)
        figures, own = ([[(e.step, e.epoch, e.learning_rate, e.tokens, e.padding, e.loss, e.penalty, e.gradient_norm)
                          for e in each.of(Step)] for each in (log, spec.log)])
        assert len(own) == len(figures)
        for one, other in zip(own, figures, strict=True):
            assert one == pytest.approx(other, rel=10 * tolerance, abs=10 * tolerance)


def common(specs: list[Spec]) -> bool:
    """Whether none of the runs took its steps alone."""
    return not any(event.kind == "cohort" for spec in specs for event in spec.log.of(Warned))


MIXED = [
    lambda: Spec([LoRA(rank=2, dropout=0.2)], settings(), seed=1),
    lambda: Spec([LoRA(rank=2, dropout=0.2)], settings(), seed=1),
    lambda: Spec([LoRA(rank=4, targets="attention"), ToyMethod(weight=0.01, targets="mlp")],
                 settings(5, learning_rate=3e-3, schedule="cosine", clip=None), seed=2),
    lambda: Spec([LoRA(rank=3, dropout=0.1)], settings(9, batch_size=3, optimizer="sgd", learning_rate=1e-2, clip=0.1, weight_decay=0.1), seed=1),
    lambda: Spec([IA3()], settings(4, batch_size=6)),
    lambda: Spec([DoRA(rank=2, dropout=0.3, targets="mlp")], settings(7)),
    lambda: Spec([Bottleneck(size=3)], settings(6)),
]


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert"])
def test_a_cohort_of_different_runs_is_these_runs_one_by_one(layout):
    specs = [make() for make in MIXED]
    assert_same_runs(layout, specs)
    assert common(specs)


@pytest.mark.parametrize("layout", ["bert", "llama-classifier", "t5"])
def test_heads_prefixes_and_replaced_tensors(layout):
    head = [Full(targets="re:.*(classifier|score)")] if KINDS[layout] == "class" else []
    specs = [Spec([Prefix(length=3)], settings(), heads=head), Spec([Prefix(length=5)], settings(5), heads=head, seed=1),
             Spec([LoRA(rank=2, dropout=0.1)], settings(), heads=head),
             Spec([BitFit()] if layout != "llama-classifier" and layout != "t5" else [IA3()], settings(optimizer="sgd"), heads=head)]
    assert_same_runs(layout, specs)
    assert common(specs)
