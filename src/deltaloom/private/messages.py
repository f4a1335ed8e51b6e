"""What crosses the cut between a party and the owner, as plain records, and the few interfaces that carry and guard it.

Everything else of private tuning stands on this file: the party's `RemoteBack` makes requests and hands them to a `Channel`,
the owner's `Back` answers them (`Answering`), the wire turns them into frames, guards change a tensor before it leaves.

    exchange             request -> reply                        transfers a token
    loss at the owner    LossRequest -> LossReply                hidden up, its gradient down
    labels at home       OutputsRequest -> OutputsReply          hidden up, outputs at the label positions down
                         GradientRequest -> GradientReply        their gradient up, the hidden states' gradient down
    evaluation           ScoreRequest -> ScoreReply, or OutputsRequest
    decoding             OpenRequest, ExtendRequest, CloseRequest

Tensors are dense, contiguous and on the CPU where they cross. An error of the owner is raised at the party, by
`Future.result()`; the two kinds that a party acts upon are `ForgottenError` and `BusyError`.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from deltaloom.errors import DeltaloomError

Layout = Literal["packed", "padded", "masked"]
Output = Literal["hidden", "logits"]
Crossing = Literal["hidden", "gradient", "update"]
Phase = Literal["training", "evaluation", "inference", "round"]


class ForgottenError(DeltaloomError):
    """The owner has no longer what a request names (it was restarted, or made room): send it again with everything."""


class BusyError(DeltaloomError):
    """The owner has no room for a further session or request of this party now."""


@dataclass(frozen=True)
class Key:
    """Which exchange of a run this is. (party, kind of request, key) is unique; a repeat of it gets the same answer.

    `step` counts optimizer steps of the run from 1 (training), or evaluations and predictions (the others); `micro` counts
    the requests of one kind within a step from 0.
    """

    step: int
    micro: int


@dataclass(frozen=True)
class Rows:
    """Hidden states at the cut: the rows of a micro-batch one after another, without padding.

    hidden: (tokens, d_model), the output of the last block of the front, float32, bfloat16 or float16.
    lengths: tokens of each row, each at least 1, sum = tokens.
    offsets: the position of each row's first token: 0, or while decoding the number of tokens before.
    layout: how the front ran the rows; the back repeats it, so that one party alone gets the unsplit model's bits:
        "packed" in one row of segments, "padded" on the right without a mask, "masked" the same with a mask.
    """

    hidden: Tensor
    lengths: tuple[int, ...]
    offsets: tuple[int, ...]
    layout: Layout


@dataclass(frozen=True)
class LossRequest:
    """A training micro-batch whose loss the owner computes.

    places: (n,) int64, flat positions in `rows.hidden` whose output is scored (for a language model those whose next token
    is learned, for a classifier one of each row). labels: (n,) int64, the tokens or classes there. weights: one weight for
    each class, or None.
    """

    key: Key
    rows: Rows
    places: Tensor
    labels: Tensor
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class LossReply:
    """loss: scalar, the (weighted) sum over the places, in nats. gradient: (tokens, d_model), of that sum."""

    loss: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class OutputsRequest:
    """What the back makes of rows, at some places only: training with labels at home, and prediction.

    output: "hidden", the last hidden state after the final norm (n, d_model), or "logits" (n, outputs). `keep`: a
    `GradientRequest` with the same key will follow.
    """

    key: Key
    rows: Rows
    places: Tensor
    output: Output
    keep: bool = False


@dataclass(frozen=True)
class OutputsReply:
    """outputs: (n, d_model) or (n, outputs)."""

    outputs: Tensor


@dataclass(frozen=True)
class GradientRequest:
    """The gradient of the party's loss with respect to the outputs of the `OutputsRequest` of the same key.

    gradient: (n, d_model) or (n, outputs). `forward` is None, or that whole request again (as it was sent, guards
    included): what an owner that answered ForgottenError needs to compute the forward pass once more.
    """

    key: Key
    gradient: Tensor
    forward: OutputsRequest | None = None


@dataclass(frozen=True)
class GradientReply:
    """gradient: (tokens, d_model), with respect to the hidden states at the cut."""

    gradient: Tensor


@dataclass(frozen=True)
class ScoreRequest:
    """Losses for evaluation, without gradients; places and labels as in `LossRequest`."""

    key: Key
    rows: Rows
    places: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ScoreReply:
    """losses: (n,) in nats, unweighted."""

    losses: Tensor


@dataclass(frozen=True)
class OpenRequest:
    """A decoding session of one row with a KV cache at the owner, of at most `max_length` tokens."""

    session: str
    max_length: int


@dataclass(frozen=True)
class ExtendRequest:
    """The next tokens of a session: the prompt, then one token after another.

    rows: one row; its offset is the number of tokens before. If the cache has just taken exactly these, the last answer is
    given again; any other offset than the cache's length is refused. `logits`: those of the last token too, to sample from.
    """

    session: str
    rows: Rows
    logits: bool = False


@dataclass(frozen=True)
class ExtendReply:
    """token: the likeliest next one. logits: (outputs,) if they were asked for."""

    token: int
    logits: Tensor | None = None


@dataclass(frozen=True)
class CloseRequest:
    """Give a session's cache back. Closing one that is not there is no error."""

    session: str


@dataclass(frozen=True)
class DoneReply:
    """Answer to opening and closing."""


Request = LossRequest | OutputsRequest | GradientRequest | ScoreRequest | OpenRequest | ExtendRequest | CloseRequest
Reply = LossReply | OutputsReply | GradientReply | ScoreReply | ExtendReply | DoneReply


@dataclass(frozen=True)
class BackFacts:
    """What a party must know of the back it talks to; its front has to fit.

    fingerprint: of the whole model's backbone. cut: blocks in the front, of `blocks` in all. width: d_model. outputs: size of
    the head's output (vocabulary or classes), 0 without a head at the owner. max_length: positions a row may have, if limited.
    front: the hash of the front, see `cut.front_hash`.
    """

    fingerprint: str
    architecture: str
    task: str
    cut: int
    blocks: int
    width: int
    outputs: int
    max_length: int | None
    dtype: str
    front: str = ""


class Channel(Protocol):
    """The party's way to the owner: in process, or a stream.

    Requests may overtake one another only where their kinds and keys differ; the futures say which reply is whose.
    """

    @property
    def facts(self) -> BackFacts:
        """The back at the other end."""

    @property
    def window(self) -> int:
        """Requests that may be under way at once, at least 1."""

    def submit(self, request: Request) -> Future[Reply]:
        """Send a request; waits only while `window` requests are under way. Errors of the owner are raised by the future."""

    def close(self) -> None:
        """No further request; those under way are answered or fail."""


class Answering(Protocol):
    """The owner's end behind any wire; may be called from several threads, and then answers calls together where it can."""

    @property
    def facts(self) -> BackFacts:
        """What parties are told."""

    def answer(self, party: str, request: Request) -> Reply:
        """The reply to one request of an authenticated party, whose shapes and sizes the wire has checked.

        Raises:
            ForgottenError, BusyError, RefusedError: told to the party as they are.
        """


@dataclass(frozen=True)
class GuardContext:
    """What a guard may know of the tensor that it protects.

    crossing: hidden states (tokens, d_model), a gradient of outputs (n, outputs or d_model), or an update of a round.
    lengths: for hidden states tokens of each text, for gradients its label positions. texts: a name for each of these texts, the
    same whenever it is sent; empty where nobody says. scope: names the run, evaluation or session unlike any other.
    Randomness has to depend on scope, phase, crossing and key together: the same noise on two texts would give away their
    difference. Only what a run that was resumed sends again, with the same scope and key, is the same text.
    """

    crossing: Crossing
    phase: Phase
    key: Key
    lengths: tuple[int, ...] = ()
    scope: str = ""
    texts: tuple[str, ...] = ()


class Guard(Protocol):
    """One layer of the onion around what leaves the party; layers apply in order, the last one is outermost."""

    @property
    def name(self) -> str:
        """As settings, frames and the audit log name it."""

    def outgoing(self, tensor: Tensor, context: GuardContext) -> Tensor:
        """The tensor as it may leave: same shape and dtype, differentiable in it (straight through where it rounds).

        A guard that does not care about this kind of crossing gives the tensor back.
        """
