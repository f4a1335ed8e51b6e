"""Decoding sessions at the owner: a KV cache of the back's blocks for one row each, within limits.

A session is named by its party; the cache never holds a token, only what the back makes of the hidden states. A session that is
idle too long, or that a restart took away, is forgotten: the party opens it anew and sends all its hidden states again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import DynamicCache

from deltaloom.errors import RefusedError
from deltaloom.private.cut import Half
from deltaloom.private.messages import BusyError, CloseRequest, ExtendReply, ExtendRequest, ForgottenError, OpenRequest
from deltaloom.settings import Settings


class SessionSettings(Settings):
    """Limits of decoding sessions."""

    per_party: int = Field(4, ge=1)
    """Sessions that one party may have open."""
    tokens: int = Field(4096, ge=1)
    """Tokens that one session may reserve."""
    total_tokens: int = Field(65536, ge=1)
    """Tokens that all sessions together may reserve."""
    idle_seconds: float = Field(600.0, gt=0)
    """After so long without a request a session is forgotten."""


@dataclass
class _Session:
    cache: DynamicCache
    reserved: int
    length: int
    used: float
    last: tuple[int, Tensor, ExtendReply] | None = None  # (offset, hidden, reply) of the last request


class Sessions:
    """The open sessions of all parties; called by one thread at a time."""

    def __init__(self, half: Half, settings: SessionSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.half = half
        self.settings = settings
        self.clock = clock
        self._open: dict[tuple[str, str], _Session] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, party: str, request: OpenRequest) -> None:
        """Reserve a cache; opening anew forgets what the session held.

        Raises:
            BusyError: no room. RefusedError: longer than allowed, or no language model.
        """
        if not self.half.is_decoder or self.half.task != "causal-lm" or not self.half.has_head:
            raise RefusedError("this back writes no text", got=self.half.config.model_type,
                               legal="a causal language model whose head is at the owner")
        if not 1 <= request.max_length <= self.settings.tokens:
            raise RefusedError("a session of that length is not allowed", got=request.max_length,
                               legal=f"1 to {self.settings.tokens} tokens")
        self._forget_idle()
        self._open.pop((party, request.session), None)
        if sum(owner == party for owner, _ in self._open) >= self.settings.per_party:
            raise BusyError("this party has as many sessions as it may have", got=self.settings.per_party,
                            hint="Close one, or wait.")
        if sum(each.reserved for each in self._open.values()) + request.max_length > self.settings.total_tokens:
            raise BusyError("all room for sessions is taken", hint="Try again later, or ask for a shorter one.")
        cache = DynamicCache(config=self.half.model.config)
        self._open[party, request.session] = _Session(cache, request.max_length, 0, self.clock())

    @torch.no_grad()
    def extend(self, party: str, request: ExtendRequest) -> ExtendReply:
        """The likeliest next token after these; a repeat of the last request gets its answer again.

        Raises:
            ForgottenError: there is no such session. RefusedError: another offset, or too long.
        """
        self._forget_idle()
        session = self._open.get((party, request.session))
        if session is None:
            raise ForgottenError("there is no such session", got=request.session, hint="Open it and send everything again.")
        rows = request.rows
        if len(rows.lengths) != 1:
            raise RefusedError("a session is one row", got=len(rows.lengths))
        offset = rows.offsets[0]
        hidden = rows.hidden.to(self.half.model.device, self.half.model.dtype)
        if session.last is not None and session.last[0] == offset and torch.equal(session.last[1], hidden):
            return session.last[2]
        if offset != session.length:
            raise RefusedError("a session goes on where it ended", got=offset, legal=session.length)
        if offset + len(hidden) > session.reserved:
            raise RefusedError("the session is longer than was reserved", got=offset + len(hidden), legal=session.reserved)
        places = torch.arange(offset, offset + len(hidden), device=hidden.device)[None]
        output = self.half.model.base_model(inputs_embeds=hidden[None], position_ids=places, past_key_values=session.cache,
                                            use_cache=True)
        head = self.half.model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            raise RefusedError("this back has no head")
        logits = head(output.last_hidden_state[:, -1])[0].float()
        reply = ExtendReply(int(logits.argmax()), logits if request.logits else None)
        session.length, session.used, session.last = offset + len(hidden), self.clock(), (offset, hidden, reply)
        return reply

    def close(self, party: str, request: CloseRequest) -> None:
        """Give a session's cache back, if there is one."""
        self._open.pop((party, request.session), None)

    def forget(self, party: str) -> None:
        """Give back all sessions of a party."""
        for key in [key for key in self._open if key[0] == party]:
            del self._open[key]

    def _forget_idle(self) -> None:
        now = self.clock()
        for key in [key for key, each in self._open.items() if now - each.used > self.settings.idle_seconds]:
            del self._open[key]
