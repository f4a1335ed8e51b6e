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
from deltaloom.data.batches import collate, sizes_of
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
from deltaloom.train.cohort import Cohort
from deltaloom.train.feed import ExampleFeed
from deltaloom.train.loop import LOSS, Start, train
from deltaloom.train.settings import EarlyStop, TrainSettings
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
    """AdamW with a large eps: with a small one it makes whole steps of gradients that are nothing but rounding."""
    given = {"max_steps": steps, "batch_size": 4, "learning_rate": 1e-3} | more
    return TrainSettings(**given if given.get("optimizer") == "sgd" else {"eps": 1e-5} | given)


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
            torch.testing.assert_close(state[name], tensor, atol=tolerance, rtol=tolerance,
                                       msg=lambda text, n=name: f"{n}: {text}")
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
    lambda: Spec([LoRA(rank=3, dropout=0.1)], 
                 settings(9, batch_size=3, optimizer="sgd", learning_rate=1e-2, clip=0.1, weight_decay=0.1), seed=1),
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
             Spec([BitFit()] if layout == "bert" else [IA3()], settings(optimizer="sgd"), heads=head)]
    assert_same_runs(layout, specs)
    assert common(specs)


def metric(tuned: Tuned) -> dict[str, float]:
    """An evaluation that is worse every time, by a little that depends on the deltas; it draws random numbers too."""
    torch.rand(3)
    size = sum(float(tensor.double().square().sum()) for tensor in tuned.delta_state().values())
    return {"loss": size}


def test_runs_end_when_they_end_and_the_next_ones_take_their_places():
    def specs():
        early = settings(40, eval_every=2, early_stop=EarlyStop(patience=1), restore_best=True)
        return [Spec([LoRA(rank=2, dropout=0.1)], settings(3, eval_every=1), evaluate=metric),
                Spec([LoRA(rank=3)], early, evaluate=metric, seed=1), Spec([ToyMethod(weight=0.1)], settings(7), seed=2),
                Spec([LoRA(rank=1, dropout=0.2)], settings(4), seed=3),
                Spec([LoRA(rank=2)], settings(epochs=0.5, max_steps=None))]
    own = specs()
    assert_same_runs("gpt2", own, slots=2)
    assert common(own)
    assert own[1].log.of(Finished)[0].reason == "early_stop"
    assert [event.step for event in own[0].log.of(Evaluated)] == [1, 2, 3]


def test_a_run_that_is_no_longer_finite_leaves_and_the_others_go_on_unharmed():
    def specs():
        return [Spec([LoRA(rank=2, dropout=0.1)], settings()), Spec([LoRA(rank=2)], settings(learning_rate=1e38, clip=None)),
                Spec([LoRA(rank=2, dropout=0.1)], settings(), seed=1)]
    bad = specs()
    outcomes = run_together("bert", bad, Rows())
    assert isinstance(outcomes[1][1], NonFiniteError) and "non-finite" in str(outcomes[1][1])
    for number in (0, 2):
        expected, _, _ = run_alone("bert", specs()[number], Rows())
        for name, tensor in expected.items():
            torch.testing.assert_close(outcomes[number][0][name], tensor, atol=1e-6, rtol=1e-6)
    assert common(bad)


@pytest.mark.parametrize(("methods", "more", "reason"), [
    ([Prompt(length=2)], {}, "in front of the text"), ([LoRA(rank=2)], {"gradient_checkpointing": True}, "computed again")])
def test_what_cannot_share_a_pass_takes_its_steps_alone_and_says_so(methods, more, reason):
    specs = [Spec([LoRA(rank=2, dropout=0.1)], settings()), Spec(methods, settings(**more), seed=1),
             Spec([LoRA(rank=4)], settings())]
    assert_same_runs("llama", specs)
    assert not common(specs) and common([specs[0], specs[2]])
    assert reason in specs[1].log.of(Warned)[-1].message


def test_a_model_whose_draws_cannot_be_told_apart_is_trained_run_by_run(monkeypatch):
    """Its attention is transformers' own, which draws for the whole batch at once."""
    monkeypatch.setattr(attention, "install", lambda model: None)
    specs = [Spec([LoRA(rank=2)], settings(4)), Spec([LoRA(rank=2)], settings(4), seed=1)]
    assert_same_runs("llama", specs)
    assert all("told apart" in spec.log.of(Warned)[-1].message for spec in specs)


class Failing(Rows):
    """Fails where rows of several runs are together."""

    def row_losses(self, model, batch):
        if isinstance(model.routing.lanes, tuple):
            raise RuntimeError("no room for so many")
        return super().row_losses(model, batch)


def test_what_fails_together_is_tried_alone():
    specs = [Spec([LoRA(rank=2, dropout=0.1)], settings(3)), Spec([LoRA(rank=2)], settings(3), seed=1)]
    together = run_together("gpt2", specs, Failing())
    for spec, (state, outcome) in zip(specs, together, strict=True):
        expected, result, _ = run_alone("gpt2", spec, Rows())
        assert outcome.step == result.step == 3
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        assert "no room" in spec.log.of(Warned)[-1].message


def test_steps_that_fill_a_pass_are_taken_alone_bit_for_bit():
    specs = [Spec([LoRA(rank=2, dropout=0.1)], settings(3)), Spec([LoRA(rank=2)], settings(3), seed=1)]
    for spec, (state, _) in zip(specs, run_together("gpt2", specs, Rows(), room=8), strict=True):
        expected, _, _ = run_alone("gpt2", spec, Rows())
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_signal_ends_every_run_of_a_cohort():
    tuned, task = Tuned(shaky("gpt2")), Rows()
    with Cohort(tuned, task) as cohort:
        for number in range(2):
            tuned.add(f"run-{number}", [LoRA(rank=2)])
            spec = Spec([], settings(9))
            cohort.join(Start(tuned, task, spec.feed("gpt2"), spec.settings, spec.log.emit, 0, None, LOSS, None, None, None, {}),
                        f"run-{number}")
        assert cohort.step() == []
        cohort.stop.name = "SIGTERM"
        left = cohort.step()
    assert len(left) == 2 and all(isinstance(each.outcome, Interrupted) for each in left) and not cohort.members


def test_rows_of_a_common_batch_know_what_they_would_be_alone():
    for kind, layout in (("causal", "gpt2"), ("class", "bert"), ("seq2seq", "t5")):
        chosen = examples(layout, 9)
        whole = collate(chosen, 0, kind, 0)
        for start, stop in ((0, 4), (4, 6), (6, 9)):
            alone, sizes = collate(chosen[start:stop], 0, kind, 0), sizes_of(whole, start, stop)
            assert (sizes.rows, sizes.tokens, sizes.padded_tokens) == (alone.rows, alone.tokens, alone.padded_tokens)
            for name, tensor in alone.inputs.items():
                assert sizes.widths[whole.inputs[name].shape[1]] == tensor.shape[1]
    same = [Example(0, [3] * 5, [4] * 2, 7), Example(1, [3] * 4, [4] * 5, 9)]
    assert sizes_of(collate(same, 0, "seq2seq", 0), 0, 1) is None
