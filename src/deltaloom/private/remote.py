"""The remote part of a model as an nn.Module whose autograd is the call: hidden states go over the cut, gradients come back.

Two ways to a gradient:
- `RemoteBack.forward` waits for the outputs of the back; their gradient goes over in the backward pass. Any loss may follow.
- `RemoteBack.promise` sends and does not wait: it gives a loss whose value is filled in when its backward pass asks for the
  reply. So the training loop may send further micro-batches before it goes back through the first (`train(..., ahead=window)`).
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deltaloom.errors import DeltaloomError, RefusedError
from deltaloom.private.cut import Half
from deltaloom.private.messages import (
    Channel,
    ForgottenError,
    GradientReply,
    GradientRequest,
    Guard,
    GuardContext,
    Key,
    Layout,
    LossReply,
    LossRequest,
    Output,
    OutputsReply,
    OutputsRequest,
    Phase,
    Reply,
    Rows,
    ScoreReply,
    ScoreRequest,
)

R = TypeVar("R")


@dataclass(frozen=True)
class Packing:
    """How the rows of a micro-batch lie: their lengths, and the layout in which the front ran them; for guards their names."""

    lengths: tuple[int, ...]
    layout: Layout
    texts: tuple[str, ...] = ()


class RemoteBack(nn.Module):
    """The back of a model at the other end of a channel; it has no parameters here.

    `guards` are applied in order to what leaves. `begin(step)` names the optimizer step that the next calls belong to. `run`
    names the training run, for guards that draw: a resumed run that has the same name draws what it drew; without a name, and
    outside of training, everything is drawn anew.

    Raises:
        RefusedError: the front is not of the model, or not cut at the place, that the back is.
    """

    def __init__(self, channel: Channel, front: Half, guards: Sequence[Guard] = (), run: str | None = None) -> None:
        super().__init__()
        check_fit(front, channel)
        self.channel = channel
        self.guards = tuple(guards)
        self.step = 0
        self._run = run or secrets.token_hex(16)
        self._passing = secrets.token_hex(16)  # scope of evaluations
        self._micro: Counter[str] = Counter()

    def begin(self, step: int) -> None:
        """The next calls belong to this optimizer step, counted from 1."""
        self.step = step
        self._micro.clear()

    def forward(self, hidden: Tensor, packing: Packing, places: Tensor, output: Output) -> Tensor:
        """The back's outputs at places: hidden (tokens, d_model), places (n,) -> (n, d_model) or (n, outputs).

        Differentiable in `hidden`; waits for the reply.
        """
        key = self._key("outputs")
        guarded = self._guarded(hidden, packing, key)
        if not (torch.is_grad_enabled() and guarded.requires_grad):
            request = OutputsRequest(key, _rows(guarded, packing), _sent(places), output)
            return expect(self.channel.submit(request), OutputsReply).outputs.to(hidden.device)
        return _Outputs.apply(guarded, self, key, packing, places, output)

    def scores(self, hidden: Tensor, packing: Packing, places: Tensor, labels: Tensor) -> Tensor:
        """Losses (n,) in nats at places, computed by the owner, without gradients."""
        key = self._key("scores")
        rows = _rows(self._guarded(hidden, packing, key, "evaluation"), packing)
        reply = expect(self.channel.submit(ScoreRequest(key, rows, _sent(places), _sent(labels))), ScoreReply)
        return reply.losses.to(hidden.device)

    def loss(self, hidden: Tensor, packing: Packing, places: Tensor, labels: Tensor,
             weights: tuple[float, ...] | None = None) -> Tensor:
        """The promise of the loss summed over places, computed by the owner: a scalar, NaN until its backward pass."""
        key = self._key("loss")
        guarded = self._guarded(hidden, packing, key)
        future = self.channel.submit(LossRequest(key, _rows(guarded, packing), _sent(places), _sent(labels), weights))
        return _Promised.apply(guarded, _OwnersLoss(future))

    def promise(self, hidden: Tensor, packing: Packing, places: Tensor, output: Output,
                loss: Callable[[Tensor], Tensor]) -> Tensor:
        """The promise of a loss that `loss` makes, here, of the back's outputs: labels stay home. A scalar, as in `loss`."""
        key = self._key("outputs")
        guarded = self._guarded(hidden, packing, key)
        request = OutputsRequest(key, _rows(guarded, packing), _sent(places), output, keep=True)
        return _Promised.apply(guarded, _HomeLoss(self, request, packing, self.channel.submit(request), loss))

    def returned(self, request: OutputsRequest, packing: Packing, gradient: Tensor) -> Tensor:
        """The gradient at the cut for a gradient of outputs; where the owner forgot the forward pass, it is sent again."""
        if self.guards:
            context = GuardContext("gradient", "training", request.key, _places_of(request), self._run, packing.texts)
            for guard in self.guards:
                gradient = guard.outgoing(gradient, context)
        gradient = _sent(gradient)
        try:
            reply = expect(self.channel.submit(GradientRequest(request.key, gradient)), GradientReply)
        except ForgottenError:
            reply = expect(self.channel.submit(GradientRequest(request.key, gradient, request)), GradientReply)
        return reply.gradient

    def _guarded(self, hidden: Tensor, packing: Packing, key: Key, phase: Phase | None = None) -> Tensor:
        phase = phase or ("training" if torch.is_grad_enabled() else "evaluation")
        context = GuardContext("hidden", phase, key, packing.lengths, self._run if phase == "training" else self._passing,
                               packing.texts)
        for guard in self.guards:
            hidden = guard.outgoing(hidden, context)
        return hidden

    def _key(self, kind: str) -> Key:
        self._micro[kind] += 1
        return Key(self.step, self._micro[kind] - 1)


def check_fit(front: Half, channel: Channel) -> None:
    """That a front and the back at the other end are halves of one model.

    Raises:
        RefusedError: with what differs.
    """
    there, own = channel.facts, front.facts()
    pairs = {"fingerprint": (own.fingerprint, there.fingerprint), "cut": (own.cut, there.cut), "task": (own.task, there.task),
             "blocks": (own.blocks, there.blocks), "d_model": (own.width, there.width),
             "hash of the front": (own.front[:16], there.front[:16]), "numbers": (own.dtype, there.dtype)}
    problems = [f"{name}: {mine} here, {theirs} at the owner" for name, (mine, theirs) in pairs.items() if mine != theirs]
    if front.part != "front":
        problems.append(f"this half is a {front.part}")
    if front.has_head == bool(there.outputs):
        problems.append("both ends have a head" if front.has_head else "neither end has a head")
    if problems:
        raise RefusedError("this front does not fit the owner's back", problems=problems,
                           hint="Ask the owner for the front of the model that it serves.")


def expect(future: Future[Reply], kind: type[R]) -> R:
    """The reply, which must be of one kind."""
    reply = future.result()
    if not isinstance(reply, kind):
        raise DeltaloomError("the owner answered with another kind of reply", got=type(reply).__name__, legal=kind.__name__)
    return reply


def _rows(hidden: Tensor, packing: Packing) -> Rows:
    return Rows(_sent(hidden), packing.lengths, (0,) * len(packing.lengths), packing.layout)


def _places_of(request: OutputsRequest) -> tuple[int, ...]:
    """How many of the places lie in each row."""
    ends = torch.tensor(request.rows.lengths).cumsum(0)
    rows = torch.bucketize(request.places, ends, right=True)
    return tuple(torch.bincount(rows, minlength=len(ends)).tolist())


def _sent(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


class _Outputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, remote: RemoteBack, key: Key, packing: Packing, places: Tensor,
                output: Output) -> Tensor:
        ctx.remote, ctx.packing = remote, packing
        ctx.request = OutputsRequest(key, _rows(hidden, packing), _sent(places), output, keep=True)
        return expect(remote.channel.submit(ctx.request), OutputsReply).outputs.to(hidden.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient = ctx.remote.returned(ctx.request, ctx.packing, grads[0])
        return gradient.to(grads[0].device), None, None, None, None, None


class Exchange(ABC):
    """What a promised loss waits for."""

    @abstractmethod
    def finish(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, the gradient at the cut of the loss times `scale`)."""


class _OwnersLoss(Exchange):
    def __init__(self, future: Future[Reply]) -> None:
        self.future = future

    def finish(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        reply = expect(self.future, LossReply)
        gradient = reply.gradient.to(scale.device)
        return reply.loss, gradient * scale.to(gradient.dtype)


class _HomeLoss(Exchange):
    def __init__(self, remote: RemoteBack, request: OutputsRequest, packing: Packing, future: Future[Reply],
                 loss: Callable[[Tensor], Tensor]) -> None:
        self.remote, self.request, self.packing, self.future, self.loss = remote, request, packing, future, loss

    def finish(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            outputs = expect(self.future, OutputsReply).outputs.to(scale.device).requires_grad_()
            loss = self.loss(outputs)
            loss.backward(scale.to(loss.dtype))  # also into a head that trains here
        if outputs.grad is None:
            raise RefusedError("the loss does not depend on the outputs of the back")
        return loss.detach(), self.remote.returned(self.request, self.packing, outputs.grad)


class _Promised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, exchange: Exchange) -> Tensor:
        promised = torch.full((), torch.nan, device=hidden.device)
        ctx.exchange, ctx.value, ctx.like = exchange, promised.detach(), hidden.dtype
        return promised

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        loss, gradient = ctx.exchange.finish(grads[0])
        ctx.value.fill_(loss.item())  # the same memory as the loss that the caller holds
        return gradient.to(grads[0].device, ctx.like), None
