"""Split inference: the party's front and the owner's back each keep a KV cache, and one token crosses the cut at a time.

Up goes the hidden state of the newest token, down comes the likeliest next one (or its scores, to draw from). The party keeps
what it sent, so that a session that the owner forgot, by a restart or for lack of use, goes on where it was.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from deltaloom.errors import DeltaloomError, RefusedError
from deltaloom.generate import Prompt, check_numbers, choose, decoding, encoded, end_tokens, pieces_of, text_of
from deltaloom.private.account import text_name
from deltaloom.private.cut import Half
from deltaloom.private.messages import (
    BusyError,
    Channel,
    CloseRequest,
    DoneReply,
    ExtendReply,
    ExtendRequest,
    ForgottenError,
    Guard,
    GuardContext,
    Key,
    OpenRequest,
    Reply,
    Rows,
)
from deltaloom.private.remote import expect
from deltaloom.tuned import Tuned

BUSY_SECONDS = 0.25  # between two questions for room
AT_ONCE = 4  # rows that are written at the same time; what an owner allows a party by default
CLOSING_SECONDS = 5.0  # a channel that is closed before its owner heard of a session's end leaves it there until it is idle


@dataclass(frozen=True)
class Writer:
    """A tuned front that writes text with the back at the other end of a channel; `patience`: seconds to wait for room there.

    Raises:
        RefusedError: the model is no language model whose head is at the owner.
    """

    tuned: Tuned
    front: Half
    channel: Channel
    tokenizer: Any
    guards: Sequence[Guard] = ()
    patience: float = 15.0

    def __post_init__(self) -> None:
        if self.front.task != "causal-lm" or self.front.has_head:
            raise RefusedError("this front writes no text", got=f"{self.front.task}, head at the {self.front.head}",
                               legal="a causal language model whose head is at the owner")

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0,
                 seed: int = 0, at_once: int = AT_ONCE) -> list[str]:
        """The text after each prompt, as `deltaloom.generate.generate` writes it; up to `at_once` sessions side by side.

        Sampling draws each row from its own generator, so that the company of other rows changes nothing.

        Raises:
            UsageError: an empty prompt, a number out of range. BusyError: the owner has no room for even one session.
        """
        check_numbers(max_new_tokens, temperature, top_p, at_once)
        rows = encoded(self.tokenizer, prompts)
        ends = end_tokens(self.front.model, self.tokenizer)
        found: dict[int, list[int]] = {}
        live: dict[int, _Row] = {}
        waiting = list(range(len(rows)))[::-1]
        closings: list[Future[Reply]] = []
        try:
            while waiting or live:
                while waiting and len(live) < at_once:
                    index = waiting.pop()
                    row = _Row(self, rows[index], max_new_tokens, temperature, top_p, seed + index)
                    try:
                        row.open(0.0 if live else self.patience)
                    except BusyError:
                        if not live:
                            raise
                        waiting.append(index)
                        break
                    live[index] = row
                for row in live.values():
                    row.send()
                for index, row in list(live.items()):
                    token = row.take()
                    if token in ends or row.full:
                        found[index] = row.written if token in ends else [*row.written, token]
                        closings += live.pop(index).close()
                    else:
                        row.written.append(token)
        finally:
            for row in live.values():
                closings += row.close()
            wait(closings, CLOSING_SECONDS)
        return [text_of(self.tokenizer, found[index]) for index in range(len(rows))]

    def stream(self, prompt: Prompt, *, max_new_tokens: int = 512, temperature: float = 0.0, top_p: float = 1.0,
               seed: int = 0) -> Iterator[str]:
        """Pieces of the text after one prompt, as `deltaloom.generate.stream` gives them."""
        check_numbers(max_new_tokens, temperature, top_p, 1)
        ids, = encoded(self.tokenizer, [prompt])
        return pieces_of(self.tokenizer, self._tokens(_Row(self, ids, max_new_tokens, temperature, top_p, seed)))

    def _tokens(self, row: _Row) -> Iterator[int]:
        ends = end_tokens(self.front.model, self.tokenizer)
        row.open(self.patience)
        try:
            while True:
                row.send()
                token = row.take()
                if token in ends:
                    return
                yield token
                if row.full:
                    return
                row.written.append(token)
        finally:
            wait(row.close(), CLOSING_SECONDS)


@dataclass
class _Row:
    """One text that is being written, and its session at the owner."""

    writer: Writer
    prompt: list[int]
    most: int
    temperature: float
    top_p: float
    seed: int
    written: list[int] = field(default_factory=list)
    session: str = field(default_factory=lambda: secrets.token_hex(16))
    sent: list[Tensor] = field(default_factory=list)  # hidden states that the owner has been sent, guards included
    reply: Future[Reply] | None = None

    def __post_init__(self) -> None:
        model = self.writer.front.model
        self.cache = DynamicCache(config=model.config)
        self.generator = torch.Generator(model.device).manual_seed(self.seed)
        self.name = text_name(self.prompt)  # what is written now belongs to this text

    @property
    def full(self) -> bool:
        """Whether the token that comes now is the last one."""
        return len(self.written) + 1 >= self.most

    def open(self, patience: float = 0.0) -> None:
        until = time.monotonic() + patience
        while True:
            try:
                expect(self.writer.channel.submit(OpenRequest(self.session, len(self.prompt) + self.most)), DoneReply)
                return
            except BusyError:  # an earlier process's connection may not be known to be gone yet
                if time.monotonic() >= until:
                    raise
            time.sleep(BUSY_SECONDS)

    def close(self) -> list[Future[Reply]]:
        """Give the owner's cache back; an owner that cannot be reached will forget it by itself. What to wait for."""
        with suppress(DeltaloomError):
            return [self.writer.channel.submit(CloseRequest(self.session))]
        return []

    def send(self) -> None:
        """Run the front on what is new, and send it; does not wait."""
        new = self.written[-1:] or self.prompt
        offset = sum(len(part) for part in self.sent)
        hidden = self._guarded(self._front(new), offset)
        self.sent.append(hidden)
        self.reply = self.writer.channel.submit(self._request(hidden, offset))

    def take(self) -> int:
        """The next token, end tokens included."""
        if self.reply is None:
            raise RefusedError("nothing was sent")
        try:
            answer = expect(self.reply, ExtendReply)
        except ForgottenError:
            self.open()
            answer = expect(self.writer.channel.submit(self._request(torch.cat(self.sent), 0)), ExtendReply)
        if answer.logits is None:
            return answer.token
        return int(choose(answer.logits[None].to(self.generator.device), self.temperature, self.top_p, self.generator))

    def _front(self, ids: Sequence[int]) -> Tensor:
        """Hidden states at the cut (tokens, d_model) of new tokens, after those in the cache."""
        model = self.writer.front.model
        with decoding(model, self.seed):
            output = model.base_model(torch.tensor([list(ids)], device=model.device), past_key_values=self.cache, use_cache=True)
        return output.last_hidden_state[0]

    def _guarded(self, hidden: Tensor, offset: int) -> Tensor:
        context = GuardContext("hidden", "inference", Key(offset, 0), (len(hidden),), self.session, (self.name,))
        with torch.no_grad():
            for guard in self.writer.guards:
                hidden = guard.outgoing(hidden, context)
        return hidden.detach().cpu().contiguous()

    def _request(self, hidden: Tensor, offset: int) -> ExtendRequest:
        return ExtendRequest(self.session, Rows(hidden, (len(hidden),), (offset,), "padded"), logits=self.temperature > 0)
