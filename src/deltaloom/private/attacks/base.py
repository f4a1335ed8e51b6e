"""The contract of attacks: what an honest-but-curious owner could find out, measured instead of believed.

Three kinds, by what the attacker sees: rows at the cut (which tokens?), gradients at label positions (which labels?), updates of
rounds (whose samples?). The attacker knows the model's weights, the guards' settings and public text; not the noise key.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from deltaloom.private.guards.base import Chain
from deltaloom.private.messages import GuardContext, Key
from deltaloom.registry import class_named, names_in
from deltaloom.settings import Settings

if TYPE_CHECKING:
    from deltaloom.private.attacks._nearest import Nearest

PACKAGE = "deltaloom.private.attacks"
Front = Callable[[Tensor], Tensor]
"""(rows, time) token ids of rows without padding -> (rows, time, d) hidden states at the cut."""
Prior = Callable[[Tensor], Tensor]
"""(rows, time) token ids -> (rows, vocabulary) log-probabilities of the next token."""


class Knowledge:
    """What the attacker has: a front, with or without the party's prefix, the embeddings, public text, perhaps a prior.

    `table`: (vocabulary, d) input embeddings. `causal`: a row depends on the tokens before it only. `before`, `after`: ids that
    stand around every text. `prior`: a language model of the owner's, None for none. `tokens`: those that are tried where all
    are tried, e.g. the words of a language; None for the whole vocabulary. What was computed once is kept.
    """

    def __init__(self, front: Front, table: Tensor, public: Sequence[Tensor], *, causal: bool, before: tuple[int, ...] = (),
                 after: tuple[int, ...] = (), prior: Prior | None = None, tokens: Tensor | None = None,
                 batch_tokens: int = 8192) -> None:
        self.tokens = torch.arange(len(table)) if tokens is None else tokens
        self.front, self.table, self.public, self.causal = front, table.detach().float(), tuple(public), causal
        self.before, self.after, self.prior, self._batch_tokens = before, after, prior, batch_tokens

    def run(self, ids: Tensor) -> Tensor:
        """(rows, time) -> (rows, time, d) float32, in batches and without gradients."""
        rows = max(1, self._batch_tokens // max(1, ids.shape[1]))
        with torch.no_grad():
            return torch.cat([self.front(part).float() for part in ids.split(rows)])

    def run_rows(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Hidden states of rows of any lengths, in their order."""
        found: dict[int, Tensor] = {}
        for length in sorted({len(row) for row in rows}):
            places = [place for place, row in enumerate(rows) if len(row) == length]
            found |= dict(zip(places, self.run(torch.stack([rows[place] for place in places])), strict=True))
        return [found[place] for place in range(len(rows))]

    @cached_property
    def hidden(self) -> list[Tensor]:
        """Of the public text."""
        return self.run_rows(self.public)

    @cached_property
    def probe(self) -> Tensor:
        """(2, tokens, d): each of the tokens as the first of a text, and behind the commonest token."""
        common = (int(self.frequency.argmax()),)
        return torch.stack([self._probed(self.before), self._probed((*self.before, *common))])

    def _probed(self, lead: tuple[int, ...]) -> Tensor:
        ends = [torch.tensor(side, dtype=torch.int64).expand(len(self.tokens), -1) for side in (lead, self.after)]
        ids = torch.cat([ends[0], self.tokens[:, None], ends[1]], dim=1)
        rows = max(1, self._batch_tokens // ids.shape[1])
        with torch.no_grad():
            return torch.cat([self.front(part)[:, len(lead)].float() for part in ids.split(rows)])

    @cached_property
    def frequency(self) -> Tensor:
        """(vocabulary,) how often each token occurs in the public text, less what stands around every text."""
        inner = [row[len(self.before):len(row) - len(self.after)] for row in self.public]
        return torch.bincount(torch.cat(inner), minlength=len(self.table))

    def nearest(self, chain: Chain) -> Nearest:
        """Search of the probe table as it looks through the guards, by Euclidean distance; entries are places in `tokens`."""
        from deltaloom.private.attacks._nearest import Nearest
        return Nearest(chain.centre(self.probe))

    def likeliest(self, chain: Chain) -> Nearest:
        """The same with the metric of what contexts and noise do to a token's row (Mahalanobis), learned from public text.

        Squared distances are then twice the negative log-likelihood of a Gaussian, up to a constant.
        """
        from deltaloom.private.attacks._nearest import Nearest, whitening
        places = torch.full((len(self.table),), -1).scatter(0, self.tokens, torch.arange(len(self.tokens)))
        at = torch.cat([places[row] for row in self.public])
        probes = chain.centre(self.probe)
        shift, map_ = whitening(torch.cat(sent(chain, self.hidden))[at >= 0] - probes[1][at[at >= 0]])
        return Nearest((probes + shift) @ map_, map_)


def sent(chain: Chain, rows: Sequence[Tensor], draw: int = 0) -> list[Tensor]:
    """Rows as they leave through guards; `draw` numbers independent draws of their noise."""
    contexts = (GuardContext("hidden", "training", Key(draw, place), (len(row),)) for place, row in enumerate(rows))
    return [chain.outgoing(row, context) for row, context in zip(rows, contexts, strict=True)]


class Attack(Settings, ABC):
    """One way to find something out."""

    name: ClassVar[str]


class TokenAttack(Attack):
    """From rows at the cut to tokens."""

    @abstractmethod
    def recover(self, known: Knowledge, chain: Chain, seen: Sequence[Tensor]) -> list[Tensor]:
        """Guesses (time, k), best first, for each of the rows (time, d) that were sent.

        `chain`: guards with the settings that were used and a key of the attacker's own, to learn from guarded public text.
        """


@dataclass(frozen=True)
class Gradients:
    """What the owner sees when labels stay home: gradients (n, d) of the loss by the back's outputs, and what it knows.

    outputs: (n, d), the outputs that it computed itself. head: (classes, d) if the last layer is the owner's, None if it is
    a new one that stays at the party. known: for each class the place of one sample whose label the attacker happens to know.
    logits: the outputs are logits (n, classes): the head is the owner's, and came before them.
    """

    gradients: Tensor
    outputs: Tensor
    head: Tensor | None = None
    known: Mapping[int, int] | None = None
    logits: bool = False


class LabelAttack(Attack):
    """From gradients at label positions to labels."""

    @abstractmethod
    def scores(self, seen: Gradients) -> Tensor | None:
        """(n, classes), higher is likelier; None if it knows too little to be tried."""


@dataclass(frozen=True)
class Updates:
    """What the owner sees of a round: values before and after, of one party or of all; and a way to score a sample.

    loss: (values, sample) -> scalar, differentiable by the values.
    """

    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    loss: Callable[[Mapping[str, Tensor], object], Tensor]


class MembershipAttack(Attack):
    """From an update to whether a sample was trained on."""

    @abstractmethod
    def scores(self, seen: Updates, samples: Sequence[object]) -> Tensor:
        """(samples,), higher is likelier to have been trained on."""


def attacks_of(kind: type[Attack]) -> list[type[Attack]]:
    """The classes of all attacks of a kind, by name."""
    classes = [class_named(PACKAGE, name, Attack, "attack") for name in names_in(PACKAGE)]
    return [each for each in classes if issubclass(each, kind)]
