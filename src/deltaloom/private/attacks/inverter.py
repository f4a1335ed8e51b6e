"""Inverter: a small network, trained on guarded public text, that reads a row and its neighbours and says the token.

A multilayer perceptron over a window of rows, with fresh noise in every epoch. The published inverters are recurrent (SIP in
SplitLLM, arXiv 2409.00960); the window keeps it within minutes on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from deltaloom.private.attacks._nearest import classes_of
from deltaloom.private.attacks.base import Knowledge, TokenAttack, sent
from deltaloom.private.guards.base import Chain


class Inverter(TokenAttack):
    """A multilayer perceptron over windows of rows."""

    name: ClassVar[str] = "inverter"

    guesses: int = 5
    """Guesses for each token."""
    width: int = Field(default=256, ge=1)
    """Hidden units."""
    window: int = Field(default=1, ge=0)
    """Rows before and after that it reads."""
    epochs: int = Field(default=20, ge=1)
    """Passes over the public text, each with fresh noise."""
    rate: float = Field(default=2e-3, gt=0)
    """Adam's learning rate, falling linearly."""
    batch: int = Field(default=256, ge=1)
    """Tokens of a step."""
    seed: int = 0
    """Of initial weights and order."""

    def recover(self, known: Knowledge, chain: Chain, seen: Sequence[Tensor]) -> list[Tensor]:
        """The likeliest tokens of every row."""
        tokens, places = classes_of(known.public)
        first = torch.cat(sent(chain, known.hidden))
        scale = (first.mean(0), first.std(0, correction=0).clamp(min=1e-6))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            net = nn.Sequential(nn.Linear((2 * self.window + 1) * first.shape[1], self.width), nn.GELU(),
                                nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, len(tokens)))
            self._train(net, known, chain, places, scale)
        few = min(self.guesses, len(tokens))
        with torch.no_grad():
            return [tokens[net(self._windows((row - scale[0]) / scale[1])).topk(few).indices] for row in seen]

    def _train(self, net: nn.Module, known: Knowledge, chain: Chain, places: Tensor, scale: tuple[Tensor, Tensor]) -> None:
        optimizer = torch.optim.Adam(net.parameters(), self.rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, self.epochs)
        for epoch in range(self.epochs):
            rows = [(row - scale[0]) / scale[1] for row in sent(chain, known.hidden, 1 + epoch)]
            inputs = torch.cat([self._windows(row) for row in rows])
            for batch in torch.randperm(len(places)).split(self.batch):
                loss = functional.cross_entropy(net(inputs[batch]), places[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()

    def _windows(self, row: Tensor) -> Tensor:
        """(time, d) -> (time, windows x d), zeros beyond the ends."""
        padded = functional.pad(row, (0, 0, self.window, self.window))
        return torch.cat([padded[start:start + len(row)] for start in range(2 * self.window + 1)], dim=1)
