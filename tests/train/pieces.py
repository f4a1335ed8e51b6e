"""What the tests of training share: a tiny model with dropout, rows, a task, a feed, a method with penalty and controller."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaloom.data.batches import Batch, collate
from deltaloom.data.encode import Example
from deltaloom.deltas.base import AttachContext, Attachment, Controller, Delta, Method, StepPlan
from deltaloom.deltas.lora import LoRA
from deltaloom.events import Emitter, Event
from deltaloom.sites import Site
from deltaloom.train.feed import ExampleFeed
from deltaloom.train.loop import train
from deltaloom.train.run import TrainResult
from deltaloom.train.settings import TrainSettings
from deltaloom.tuned import Tuned, attach
from tests.toys import VOCABULARY


class ToyDelta(Delta):
    """y + shift, with a penalty on the shift's distance from one; the mask is a controller's."""

    def __init__(self, width: int, weight: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))
        self.register_buffer("mask", torch.ones(width))
        self.weight = weight

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + (self.shift * self.mask).to(y.dtype)

    def penalty(self) -> Tensor | None:
        return self.weight * ((self.shift - 1) ** 2).sum()


class ToyController(Controller):
    """Remembers what it was called with, and masks one more entry of every delta at every third step."""

    def __init__(self, deltas: list[ToyDelta], plan: StepPlan) -> None:
        self.deltas = deltas
        self.plan = plan
        self.calls: list[str] = []
        self.seen = torch.zeros(())
        self.masked = {0: 0}
        self.finished = False

    def after_backward(self, step: int) -> None:
        self.calls.append(f"backward {step}")
        self.seen = self.seen + sum(delta.shift.grad.abs().sum() for delta in self.deltas)

    def after_step(self, step: int) -> None:
        self.calls.append(f"step {step}")
        if step % 3 == 0:
            self.masked[0] += 1
            for delta in self.deltas:
                delta.mask[: self.masked[0]] = 0

    def finish(self) -> None:
        self.finished = True

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls, "seen": self.seen, "masked": self.masked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls, self.seen, self.masked = list(state["calls"]), state["seen"].clone(), dict(state["masked"])


class ToyMethod(Method):
    name: ClassVar[str] = "toy"
    weight: float = 0.0
    controlled: bool = True

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        return Attachment({site: ToyDelta(site.d_out, self.weight) for site in sites})

    def controller(self, attachment: Attachment, plan: StepPlan) -> Controller | None:
        deltas = [delta for delta in attachment.deltas.values() if isinstance(delta, ToyDelta)]
        return ToyController(deltas, plan) if self.controlled else None


class LanguageTask:
    """Next-token loss by the book."""

    def loss(self, tuned: Tuned, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = tuned(**batch.inputs).logits[:, :-1].float()
        labels = batch.labels[:, 1:]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
        return loss, (labels != -100).sum()


def rows(count: int = 24, seed: int = 0) -> list[Example]:
    """Examples of unequal length whose first tokens are not learned."""
    generator = random.Random(seed)
    found = []
    for row in range(count):
        ids = [generator.randrange(3, 20) for _ in range(generator.randrange(4, 14))]
        start = generator.randrange(0, 3)
        found.append(Example(row, ids, [-100] * start + ids[start:], len(ids)))
    return found


def feed(settings: TrainSettings, examples: list[Example] | None = None, **options: Any) -> ExampleFeed:
    return ExampleFeed(examples or rows(), partial(collate, pad_id=0, kind="causal"), settings, **options)


def small(dropout: float = 0.1, seed: int = 0) -> nn.Module:
    """A tiny GPT-2 whose own dropout is active."""
    import transformers as t

    torch.manual_seed(seed)
    model = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1,
                                           eos_token_id=2, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    return model.eval()


def tuned_model(methods: Sequence[Method] | None = None, model: nn.Module | None = None) -> Tuned:
    return attach(model if model is not None else small(), methods or [LoRA(rank=2, dropout=0.2), ToyMethod(weight=0.01)], seed=3)


def held_out_loss(tuned: Tuned) -> dict[str, float]:
    """An evaluation that also draws random numbers, which must not disturb training."""
    torch.rand(7)
    random.random()
    settings = TrainSettings(batch_size=8)
    held_out = feed(settings, rows(8, seed=9))
    with torch.no_grad():
        parts = [LanguageTask().loss(tuned, held_out.batch(micro, tuned.device)) for step in held_out.steps(0) for micro in step]
    return {"loss": float(sum(loss for loss, _ in parts) / sum(count for _, count in parts))}


class Log:
    """A list of events by kind."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.emit = Emitter([self.events.append])

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def run(tuned: Tuned, settings: TrainSettings, log: Log | None = None, **options: Any) -> TrainResult:
    options.setdefault("feed", feed(settings, micro_tokens=40))
    options.setdefault("task", LanguageTask())
    return train(tuned, options.pop("task"), options.pop("feed"), settings=settings, emit=(log or Log()).emit, **options)


def state_of(tuned: Tuned) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tuned.delta_state().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


def assert_all_differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert not [name for name in one if torch.equal(one[name], other[name])]




