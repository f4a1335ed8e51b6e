"""The owner's side of the cut: answers requests on the back of the model, and never trains it.

Every answer is a pure function of its request: the back runs in evaluation mode (without dropout), its weights do not change, and
what is kept between requests (graphs of forward passes that a gradient will follow, KV caches) can be computed again from what
the party sends when it hears `ForgottenError`. So a restarted owner loses nothing.

Requests that wait at the same moment are answered together where they can be joined: one forward and backward pass for several
parties' micro-batches. Then the last bits depend on the company; alone, they are the unsplit model's. Micro-batches of one party
are never joined with one another, however many are under way: a party that is alone gets the same bits whenever they arrive.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from deltaloom.attention import PACKABLE
from deltaloom.errors import DeltaloomError, RefusedError
from deltaloom.evaluate._classes import class_loss
from deltaloom.kernels.cross_entropy import token_losses
from deltaloom.private.checks import check_labels, check_places, check_rows
from deltaloom.private.cut import Half
from deltaloom.private.messages import (
    BackFacts,
    CloseRequest,
    DoneReply,
    ExtendRequest,
    ForgottenError,
    GradientReply,
    GradientRequest,
    Key,
    LossReply,
    LossRequest,
    OpenRequest,
    OutputsReply,
    OutputsRequest,
    Reply,
    Request,
    Rows,
    ScoreReply,
    ScoreRequest,
)
from deltaloom.private.replay import class_logits, packed, row_mask, run_back, unpacked
from deltaloom.private.sessions import Sessions, SessionSettings
from deltaloom.settings import Settings


class BackSettings(Settings):
    """What the owner computes at once and keeps."""

    kept_forwards: int = Field(4, ge=0)
    """Forward passes of each party whose graphs wait for a gradient; older ones are computed again when it comes."""
    together_tokens: int = Field(8192, ge=1)
    """Tokens that are answered together at most; a larger request is answered alone."""
    sessions: SessionSettings = SessionSettings()
    """Decoding."""


@dataclass
class _Call:
    party: str
    request: Request
    reply: Future[Reply] = field(default_factory=Future)


@dataclass(frozen=True)
class _Forward:
    """A forward pass with its graph."""

    hidden: Tensor   # the leaf, (tokens, d_model)
    outputs: Tensor


class Back:
    """Answers the requests of parties; see `messages.Answering`."""

    def __init__(self, half: Half, settings: BackSettings | None = None) -> None:
        if half.part != "back":
            raise RefusedError("an owner serves a back", got=half.part)
        self.half = half
        self.settings = settings or BackSettings()
        self.sessions = Sessions(half, self.settings.sessions)
        self._facts = half.facts()
        self._waiting: deque[_Call] = deque()
        self._turn = threading.Lock()
        self._kept: dict[str, OrderedDict[Key, _Forward]] = {}

    @property
    def facts(self) -> BackFacts:
        """What parties are told."""
        return self._facts

    def answer(self, party: str, request: Request) -> Reply:
        """The reply to one request; whoever has the turn answers everything that waits.

        Raises:
            ForgottenError, BusyError, RefusedError: see `messages.Answering`.
        """
        call = _Call(party, request)
        self._waiting.append(call)
        with self._turn:
            if not call.reply.done():
                self._answer_waiting()
        return call.reply.result()

    def forget(self, party: str) -> None:
        """Give back everything that is kept for a party that left."""
        with self._turn:
            self._kept.pop(party, None)
            self.sessions.forget(party)

    # ---- together -------------------------------------------------------------------------------------------------

    def _answer_waiting(self) -> None:
        calls = []
        while self._waiting:
            calls.append(self._waiting.popleft())
        joined: list[_Call] = []
        tokens = 0
        for call in calls:
            request = call.request
            if not isinstance(request, LossRequest) or not self._joins(call):
                self._settle([call])
                continue
            size = len(request.rows.hidden)
            if joined and (tokens + size > self.settings.together_tokens or any(call.party == other.party for other in joined)):
                self._settle(joined)
                joined, tokens = [], 0
            joined.append(call)
            tokens += size
        if joined:
            self._settle(joined)

    def _joins(self, call: _Call) -> bool:
        """Whether a request can be answered in company; a wrong one is answered alone, so that it hurts nobody else."""
        if self.half.config.model_type not in PACKABLE:
            return False
        try:
            self._check(call.request)
        except DeltaloomError:
            return False
        return True

    def _settle(self, calls: Sequence[_Call]) -> None:
        try:
            if len(calls) == 1:
                calls[0].reply.set_result(self._one(calls[0].party, calls[0].request))
                return
            requests = [call.request for call in calls if isinstance(call.request, LossRequest)]
            for call, reply in zip(calls, self._losses(requests), strict=True):
                call.reply.set_result(reply)
        except BaseException as error:
            for call in calls:
                if not call.reply.done():
                    call.reply.set_exception(error)
            if not isinstance(error, Exception):
                raise

    def _one(self, party: str, request: Request) -> Reply:
        self._check(request)
        if isinstance(request, LossRequest):
            return self._losses([request])[0]
        if isinstance(request, ScoreRequest):
            with torch.no_grad():
                return ScoreReply(self._place_losses(self._run(request.rows)[0], request))
        if isinstance(request, OutputsRequest):
            return self._outputs(party, request)
        if isinstance(request, GradientRequest):
            return self._gradient(party, request)
        if isinstance(request, ExtendRequest):
            return self.sessions.extend(party, request)
        if isinstance(request, OpenRequest):
            self.sessions.open(party, request)
        else:
            self.sessions.close(party, request)
        return DoneReply()

    def _check(self, request: Request) -> None:
        if isinstance(request, CloseRequest | OpenRequest):
            return
        if isinstance(request, GradientRequest):
            if request.forward is not None:
                self._check(request.forward)
            return
        check_rows(request.rows, self._facts)
        if isinstance(request, ExtendRequest):
            return
        check_places(request.places, request.rows, one_each=self._facts.task != "causal-lm")
        if isinstance(request, LossRequest | ScoreRequest):
            check_labels(request.labels, request.places, self._facts)

    # ---- computing ------------------------------------------------------------------------------------------------

    def _run(self, rows: Rows, graph: bool = False) -> tuple[Tensor, Tensor]:
        """(last hidden states (tokens, d_model), the leaf that they come from)."""
        leaf = rows.hidden.detach().to(self.half.model.device, self.half.model.dtype).requires_grad_(graph)
        with torch.set_grad_enabled(graph):
            last = run_back(self.half.model, leaf, rows.lengths, rows.offsets, rows.layout, self.half.is_decoder)
            return packed(last, rows.layout, rows.lengths), leaf

    def _losses(self, requests: Sequence[LossRequest]) -> list[LossReply]:
        """Losses and gradients of one request, or of several in one pass."""
        rows = requests[0].rows if len(requests) == 1 else _together([request.rows for request in requests])
        last, leaf = self._run(rows, graph=True)
        sizes = [len(request.rows.hidden) for request in requests]
        with torch.enable_grad():
            losses = [self._loss(part, request) for part, request in zip(last.split(sizes), requests, strict=True)]
            gradient, = torch.autograd.grad(losses[0] if len(losses) == 1 else torch.stack(losses).sum(), leaf)
        return [LossReply(loss.detach(), part) for loss, part in zip(losses, gradient.split(sizes), strict=True)]

    def _loss(self, last: Tensor, request: LossRequest) -> Tensor:
        if self._facts.task == "causal-lm":
            return self._place_losses(last, request).sum()
        return class_loss(self._logits(last, request.rows, request.places), request.labels, request.weights)[0]

    def _place_losses(self, last: Tensor, request: LossRequest | ScoreRequest) -> Tensor:
        head = self._head()
        chosen = last[request.places]
        if type(head) is nn.Linear:
            return token_losses(chosen, head.weight, head.bias, request.labels)
        logits = head(chosen) if head is not None else self._logits(last, request.rows, request.places)
        return F.cross_entropy(logits.float(), request.labels, reduction="none")

    def _logits(self, last: Tensor, rows: Rows, places: Tensor) -> Tensor:
        """(n, outputs) at places of last hidden states (tokens, d_model)."""
        head = self._head()
        if head is not None:
            return head(last[places])
        starts = torch.tensor([0, *rows.lengths]).cumsum(0)[:-1]
        return class_logits(self.half.model, unpacked(last, row_mask(rows.lengths, last.device)), places - starts)

    def _head(self) -> nn.Module | None:
        """The language-model head, None for a classifier.

        Raises:
            RefusedError: the party has the head.
        """
        if not self.half.has_head:
            raise RefusedError("the head of this model is at the party, so that the owner has no loss and no logits to give",
                               hint="Ask for hidden states, and compute the loss where the labels are.")
        return self.half.model.get_output_embeddings() if self._facts.task == "causal-lm" else None

    def _outputs(self, party: str, request: OutputsRequest) -> OutputsReply:
        forward = self._forward(request, graph=request.keep)
        if request.keep and self.settings.kept_forwards:
            kept = self._kept.setdefault(party, OrderedDict())
            kept.pop(request.key, None)
            kept[request.key] = forward
            while len(kept) > self.settings.kept_forwards:
                kept.popitem(last=False)
        return OutputsReply(forward.outputs.detach())

    def _forward(self, request: OutputsRequest, graph: bool) -> _Forward:
        last, leaf = self._run(request.rows, graph)
        with torch.set_grad_enabled(graph):
            outputs = last[request.places] if request.output == "hidden" else self._logits(last, request.rows, request.places)
        return _Forward(leaf, outputs)

    def _gradient(self, party: str, request: GradientRequest) -> GradientReply:
        forward = self._kept.get(party, OrderedDict()).get(request.key)
        if request.forward is not None:
            forward = self._forward(request.forward, graph=True)
        if forward is None:
            raise ForgottenError("the forward pass that this gradient belongs to is not kept any more",
                                 got=f"step {request.key.step}, micro-batch {request.key.micro}")
        if request.gradient.shape != forward.outputs.shape:
            raise RefusedError("a gradient has another shape than the outputs that it belongs to",
                               got=tuple(request.gradient.shape), legal=tuple(forward.outputs.shape))
        upstream = request.gradient.to(forward.outputs.device, forward.outputs.dtype)
        # The graph stays until newer ones push it out: a repeat of this request gets the same answer.
        return GradientReply(torch.autograd.grad(forward.outputs, forward.hidden, upstream, retain_graph=True)[0])


def _together(rows: Sequence[Rows]) -> Rows:
    """Rows of several requests as segments of one."""
    first = rows[0]
    return replace(first, hidden=torch.cat([each.hidden.to(first.hidden) for each in rows]),
                   lengths=tuple(length for each in rows for length in each.lengths),
                   offsets=tuple(offset for each in rows for offset in each.offsets), layout="packed")
