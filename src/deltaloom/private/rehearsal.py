"""What the owner sees of split tuning besides hidden states, rehearsed with a stand-in for its model: nothing is sent.

    gradients_seen   a training pass over a local channel with labels at home: the gradients at label positions, for label attacks
    rehearsed_round  one joint round of several parties from common values: single updates and their mean, for membership attacks
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deltaloom.data.encode import Example
from deltaloom.errors import RefusedError
from deltaloom.evaluate.base import Task
from deltaloom.private.attacks.base import Gradients, Updates
from deltaloom.private.back import Back
from deltaloom.private.cut import Half
from deltaloom.private.front import FrontModel, Learner, wanted_labels
from deltaloom.private.guards._noise import new_key
from deltaloom.private.guards.base import Chain, Guard
from deltaloom.private.local import LocalChannel
from deltaloom.private.means.base import Weighed
from deltaloom.private.means.weighted import Weighted
from deltaloom.private.messages import GradientRequest, OutputsReply, Reply, Request
from deltaloom.private.remote import RemoteBack
from deltaloom.train.feed import ExampleFeed
from deltaloom.train.loop import train
from deltaloom.train.settings import TrainSettings
from deltaloom.tuned import Tuned

COIN = 1.96


@dataclass(frozen=True)
class Halves:
    """A tuned front and a back that stands for the owner's."""

    tuned: Tuned
    front: Half
    back: Half


def gradients_seen(halves: Halves, task: Task, examples: Sequence[Example],
                   guards: Sequence[Guard] = ()) -> tuple[Gradients, Tensor]:
    """(what the owner sees of a training pass with labels at home, the labels (n,) that it does not see).

    Each row is a step of its own. `known` has one sample of each class where the classes are few, for attacks that need one.
    """
    sent: list[Tensor] = []
    computed: list[Tensor] = []

    def outward(request: Request) -> Request:
        if isinstance(request, GradientRequest):
            sent.append(request.gradient.clone())
        return request

    def homeward(reply: Reply) -> Reply:
        if isinstance(reply, OutputsReply):
            computed.append(reply.outputs.detach().clone())
        return reply

    channel = LocalChannel(Back(halves.back), outward=outward, homeward=homeward)
    remote = RemoteBack(channel, halves.front, (Chain(guards, new_key()),) if guards else ())
    learner = Learner(task, FrontModel(halves.tuned, halves.front, remote, "home"))
    labels = []
    halves.tuned.eval()
    for step, example in enumerate(examples, 1):
        batch = task.collate([example])
        if batch.labels is None:
            raise RefusedError("these rows have no label to infer")
        remote.begin(step)
        learner.loss(halves.tuned, batch)[0].backward()
        labels.append(wanted_labels(batch, batch.labels))
    for parameter in halves.tuned.delta_parameters().values():
        parameter.grad = None
    channel.close()
    truth, logits = torch.cat(labels), not halves.front.has_head
    known = None if task.targets.labels is None else _known(truth)
    return Gradients(torch.cat(sent), torch.cat(computed), None if logits else _owners_head(halves.front), known, logits), truth


def _known(labels: Tensor) -> dict[int, int] | None:
    """One sample of each class."""
    classes = labels.unique().tolist()
    return {int(each): int((labels == each).nonzero()[0]) for each in classes} if len(classes) == int(labels.max()) + 1 else None


def _owners_head(front: Half) -> Tensor | None:
    """The head that is at the party and that the owner knows too: a language model's own."""
    head = front.model.get_output_embeddings() if front.task == "causal-lm" else None
    return head.weight.detach() if type(head) is nn.Linear else None


@dataclass(frozen=True)
class Round:
    """One rehearsed joint round: values before it, each party's after it, and their mean."""

    before: dict[str, Tensor]
    single: list[dict[str, Tensor]]
    common: dict[str, Tensor]
    loss: Callable[[Mapping[str, Tensor], Any], Tensor]

    def updates(self) -> dict[str, Updates]:
        """What attacks look at: the first party's update alone, and the mean of all."""
        return {"single": Updates(self.before, self.single[0], self.loss),
                f"mean of {len(self.single)}": Updates(self.before, self.common, self.loss)}


def rehearsed_round(tuned: Tuned, task: Task, parties: Sequence[Sequence[Example]], settings: TrainSettings, *,
                    seed: int = 0) -> Round:
    """Train every party from the values that `tuned` has, and take the mean by rows; `tuned` then has its values again."""
    trainable = set(tuned.delta_parameters())
    start = {name: tensor.clone() for name, tensor in tuned.delta_state().items()}
    after = []
    for rows in parties:
        tuned.load_delta_state(start)
        train(tuned, task, ExampleFeed(rows, task.collate, settings, seed=seed), settings=settings, seed=seed)
        after.append({name: tensor.clone() for name, tensor in tuned.delta_state().items() if name in trainable})
    tuned.load_delta_state(start)
    tuned.eval()
    before = {name: start[name] for name in after[0]}
    mean = Weighted().combine([Weighed({name: tensor.double() for name, tensor in values.items()}, len(rows))
                               for values, rows in zip(after, parties, strict=True)])
    return Round(before, after, {name: mean[name].to(before[name].dtype) for name in before}, _losses(tuned, task))


class _Loss(nn.Module):
    """A task's mean loss of a batch as a module, so that its parameters can be given from outside."""

    def __init__(self, tuned: Tuned, task: Task) -> None:
        super().__init__()
        self.tuned = tuned
        self._task = task

    def forward(self, example: Example) -> Tensor:
        """A scalar."""
        total, count = self._task.loss(self.tuned, self._task.collate([example]))
        return total / count


def _losses(tuned: Tuned, task: Task) -> Callable[[Mapping[str, Tensor], Any], Tensor]:
    """loss(values of the deltas, example), differentiable in the values."""
    module = _Loss(tuned, task)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    places = {key: names[id(parameter)] for key, parameter in tuned.delta_parameters().items()}

    def loss(values: Mapping[str, Tensor], sample: Any) -> Tensor:
        given = {places[key]: value for key, value in values.items()}
        return functional_call(module, given, (sample,))

    return loss


def coin_limit(members: int, others: int) -> float:
    """The area under the ROC curve that a guess by coin exceeds in 2.5% of cases (Mann & Whitney 1947: the variance without a
    difference is (m + n + 1) / 12 m n)."""
    return min(1.0, 0.5 + COIN * math.sqrt((members + others + 1) / (12 * members * others)))
