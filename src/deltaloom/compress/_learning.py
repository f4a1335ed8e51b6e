"""What steps that train share: deltas on the model as it is, the one training loop, and the deltas folded in afterwards."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, field_validator

from deltaloom.compress._blocks import stacks_of
from deltaloom.compress._factors import check_shared, opened_factors
from deltaloom.compress.base import Compressor, Facts, Work
from deltaloom.deltas.base import Method, layer_indices, methods_from
from deltaloom.deltas.full import Full
from deltaloom.errors import RefusedError, listed
from deltaloom.events import Emitter, Event, Step
from deltaloom.train.feed import ExampleFeed
from deltaloom.train.loop import train
from deltaloom.train.run import Learner
from deltaloom.train.settings import TrainSettings
from deltaloom.tuned import attach
from deltaloom.tuned.merging import bake, refuse_unfoldable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIRST = 10  # steps whose mean loss is told as that of the beginning, and of the end


class TrainingStep(Compressor, ABC):
    """What the steps that train share: settings."""

    calibrates: ClassVar[bool] = True

    deltas: tuple[dict[str, Any], ...] = ()
    """Records of methods as in a run file, of those that can be folded in.
    Of a factored layer NAME the factors are the layers NAME.right and NAME.left."""
    train: TrainSettings = TrainSettings(epochs=1)
    """As the `train` section of a run file, over these defaults."""
    layers: tuple[int, ...] | None = None
    """Only these blocks are trained."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of initial values and of the order of rows."""

    @field_validator("train", mode="before")
    @classmethod
    def _over_defaults(cls, value: Any) -> Any:
        return over_defaults(value, cls.model_fields["train"].default)

    @field_validator("deltas")
    @classmethod
    def _known_methods(cls, value: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        methods_of(value, cls.name)
        return value


def everything(model: PreTrainedModel) -> Method:
    """All weights of the blocks, in fp32."""
    return Full(targets="all", layers=tuple(range(max(len(stack) for stack in stacks_of(model)))))


def over_defaults(value: Any, defaults: TrainSettings) -> Any:
    """A step's section `train` as given, over the step's own defaults; a number of steps or a time replaces their epochs."""
    if not isinstance(value, dict):
        return value
    own = defaults.given()
    if value.keys() & {"max_steps", "max_time"}:
        own.pop("epochs", None)
    return own | value


def methods_of(entries: Sequence[dict[str, Any]], where: str) -> list[Method]:
    """The methods that a step's setting `deltas` names.

    Raises:
        SettingsError: as `methods_from`.
    """
    return list(methods_from(entries, f"{where}.deltas"))


def narrowed(methods: Sequence[Method], layers: Sequence[int] | None) -> list[Method]:
    """The methods on these blocks alone.

    Raises:
        RefusedError: one has no block left.
    """
    if layers is None:
        return list(methods)
    found = []
    for method in methods:
        own = layer_indices(method.layers)
        left = tuple(layer for layer in layers if own is None or layer in own)
        if not left:
            raise RefusedError(f"{method.name} has no block left to train", got=own, legal=list(layers))
        found.append(method.model_copy(update={"layers": left}))
    return found


def free_layers(work: Work) -> list[int] | None:
    """The blocks of which nothing is promised; None if nothing is promised at all."""
    if not work.promised:
        return None
    names = [record["tensor"] for record in work.promised]
    stacks = stacks_of(work.model)
    return [layer for layer in range(max(map(len, stacks)))
            if not any(name.startswith(f"{stack.path}.{layer}.") for stack in stacks for name in names)]


def learn(work: Work, methods: Sequence[Method], learner: Learner, settings: TrainSettings, *, micro_tokens: int,
          seed: int) -> Facts:
    """Train deltas of these methods on all rows of the work and fold them into the model.

    Raises:
        RefusedError: a delta that cannot be folded, or that would change what an earlier step promised to keep; before training.
        NonFiniteError, Interrupted, ResourceError: as the training loop.
    """
    if not work.examples:
        raise RefusedError("there are no rows to learn from", hint="Give Work(examples=...).")
    zeros = zero_count(work.model)
    with opened_factors(work.model):
        facts = _learn(work, methods, learner, settings, micro_tokens, seed)
    filled = zeros - zero_count(work.model)
    if filled > 0.01 * zeros:
        facts.notes.append(f"{filled / zeros:.0%} of the zeros that were in the weights are filled again: pruned entries do not "
                           "stay zero when deltas are folded in")
    return facts


def zero_count(model: torch.nn.Module) -> int:
    """Entries of the model's matrices that are exactly zero."""
    return sum(int((parameter == 0).sum()) for parameter in model.parameters() if parameter.ndim > 1)


def _learn(work: Work, methods: Sequence[Method], learner: Learner, settings: TrainSettings, micro_tokens: int,
           seed: int) -> Facts:
    kept = {record["tensor"].rpartition(".")[0] for record in work.promised}
    touched = [site.path for method in methods for site in method.sites(work.model) if site.path in kept]
    if touched:
        raise RefusedError("these layers have to stay as they are", got=listed(touched, 4),
                           hint="Name the blocks that may change: deltas: [{method: ..., layers: ...}].")
    tuned = attach(work.model, methods, seed=seed)
    losses: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, Step):
            losses.append(event.loss)

    feed = ExampleFeed(work.examples, work.task.collate, settings, seed=seed, micro_tokens=micro_tokens)
    trained = sum(tuned.counts())
    try:
        refuse_unfoldable(tuned.pairs())
        check_shared(tuned)
        result = train(tuned, learner, feed, settings=settings, emit=Emitter([note]), seed=seed)
        merged = bake(tuned)
    except BaseException:
        tuned.detach()
        raise
    work.model.eval()
    some = max(1, min(FIRST, len(losses) // 4))
    notes = list(merged.notes)
    if merged.lost > 0.1:
        notes.append(f"{merged.lost:.0%} of what was learned is lost by rounding to {work.model.dtype}: train longer, with a "
                     "higher rate, or compress with precision: fp32")
    return Facts(notes=notes, figures={
        "trained_parameters": float(trained), "steps": float(result.step), "tokens": float(result.tokens),
        "seconds": result.seconds, "loss_at_the_start": sum(losses[:some]) / some, "loss_at_the_end": sum(losses[-some:]) / some,
        "share_lost_by_rounding": merged.lost})
