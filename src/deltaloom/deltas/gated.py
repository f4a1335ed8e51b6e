"""A gate around another method's deltas: a learned factor, seen from the input, of what each delta adds.

    y' = y + g (delta(x, y) - y)                  a delta that changes a layer's output; its input likewise
    softmax([q K_p + log g, q K]) [V_p; V]        a prefix: log g is added to the scores of its keys

    g = sigmoid(w . x + b)                        of each token, in causal stacks and where a layer sees single vectors
    g = mean over t of sigmoid(w . x_t + b)       of each row, over its real tokens, in the blocks of encoders

x is what the layer reads, of a branch its input, of embeddings (which read ids) what they give. The mean leaves out padding, and
a packed row is a row. In a causal stack a mean over the row would let a token see those behind it, and a token decoded with a
cache would get another gate than in a whole pass: there the gate of a token is made from that token alone, so both agree.

A prefix's gate belongs to the query that looks. Scaled keys are no off switch, a key of zeros still takes its share of the
attention: with log g added, the weights of the prefix are exactly zero at g = 0. w starts at zero and b so that g is `start`;
nothing changes at birth that the delta alone would not change. What replaces or adds to a layer's own tensors (full, norms)
and soft prompts cannot be gated, and a gated change depends on the input, so that it cannot be merged.
Mao et al. 2022 (UniPELT, arXiv 2110.07577); their code scales a prefix's keys and averages over padding too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from deltaloom.compact.face import affine_shape, is_affine
from deltaloom.deltas._layout import BatchLayout
from deltaloom.deltas.base import (
    AttachContext,
    Attachment,
    Controller,
    Delta,
    InputDelta,
    Method,
    PrefixDelta,
    StepPlan,
    WarmUp,
    method_from,
    method_record,
)
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.sites import Kind, Site

INSIDE = "delta"  # the submodule that holds the gated delta, and the part of its tensors' names


class Gate(nn.Module):
    """log sigmoid(w . x + b) of each token, or, where `average` names a watched module, the log of its mean over each row."""

    def __init__(self, width: int, start: float, layout: BatchLayout, average: str | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.tensor(math.log(start / (1 - start))))
        self.layout = layout
        self.average = average

    def rows(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> log g as (batch, time), or (rows, 1) if averaged; vectors without time lose their last axis."""
        logs = functional.logsigmoid(x.to(self.weight.dtype) @ self.weight + self.bias)
        return logs if self.average is None or x.ndim != 3 else self.layout.log_mean(self.average, logs)

    def factor(self, x: Tensor) -> Tensor:
        """g as a factor of the vectors of x, in the gate's own type; zero where the gate is shut."""
        logs = self.rows(x)
        if self.average is not None and x.ndim == 3:
            logs = self.layout.spread(self.average, logs)
        return logs.exp()[..., None]


class GatedDelta(Delta):
    """A delta of a layer whose changes of input and output are scaled by a gate on the layer's input."""

    def __init__(self, delta: Delta, gate: Gate) -> None:
        super().__init__()
        self.delta = delta
        self.gate = gate

    def before(self, x: Tensor) -> Tensor:
        """x and the gated share of what the delta changes of it."""
        if type(self.delta).before is Delta.before:
            return x
        return x + self.gate.factor(x).to(x.dtype) * (self.delta.before(x) - x)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y and the gated share of what the delta changes of it."""
        if type(self.delta).after is Delta.after:
            return y
        g = self.gate.factor(x if x.is_floating_point() else y).to(y.dtype)
        return y + g * (self.delta.after(x, y) - y)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Refuses: the factor is another one for every input."""
        raise RefusedError("a gated delta depends on the input, it cannot be folded into the layer's weights",
                           hint="Keep the delta next to the model.")

    def penalty(self) -> Tensor | None:
        """The delta's own."""
        return self.delta.penalty()

    def orthogonality(self) -> float | None:
        """The delta's own."""
        return self.delta.orthogonality()


class GatedPrefix(PrefixDelta):
    """A prefix whose scores get the log of a gate on what the attention module reads."""

    changes_at_birth = "every query sees new keys and values from the start"
    gates = True

    def __init__(self, delta: PrefixDelta, gate: Gate) -> None:
        super().__init__()
        self.delta = delta
        self.gate = gate
        self.spares_first = delta.spares_first

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """The prefix's own."""
        return self.delta.keys_values()

    def log_gate(self, x: Tensor) -> Tensor:
        """The gate's."""
        return self.gate.rows(x)

    def penalty(self) -> Tensor | None:
        """The prefix's own."""
        return self.delta.penalty()


class Gated(Method):
    """A gate around each delta of another method."""

    name: ClassVar[str] = "gated"
    kinds: ClassVar[tuple[Kind, ...]] = get_args(Kind)

    targets: str | tuple[str, ...] = "delta"
    """Which sites; `delta`: those of the gated method's own targets."""
    delta: dict[str, Any]
    """The gated method, as an entry of `deltas` states it."""
    start: float = Field(0.5, gt=0, lt=1)
    """The gate's value at first."""

    @model_validator(mode="before")
    @classmethod
    def _layers_of_the_delta(cls, values: Any) -> Any:
        """The gated method's layers as its gate's, so that who narrows a method's layers finds them."""
        inner = values.get("delta") if isinstance(values, dict) else None
        if isinstance(inner, dict) and values.get("layers") is None and inner.get("layers") is not None:
            return {**values, "layers": inner["layers"]}
        return values

    @field_validator("delta")
    @classmethod
    def _complete(cls, record: dict[str, Any]) -> dict[str, Any]:
        """The record with all its settings; a gate around a gate is one gate too many."""
        if record.get("method") == cls.name:
            raise ValueError("a gate cannot be gated")
        try:
            return method_record(method_from(record, "delta"))
        except SettingsError as error:
            raise ValueError(str(error)) from None

    def inner(self) -> Method:
        """The gated method, with the targets and layers that are given here in place of its own."""
        given = {"targets": None if self.targets == INSIDE else self.targets, "layers": self.layers}
        return method_from(self.delta | {key: value for key, value in given.items() if value is not None}, "delta")

    def sites(self, model: nn.Module) -> list[Site]:
        """Those of the gated method."""
        return self.inner().sites(model)

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """The gated method's deltas, a gate around each; what it adds elsewhere than at these sites stays as it is.

        Raises:
            RefusedError: a delta that has nothing to scale.
        """
        inner = self.inner()
        wanted = [site for site in sites if site.kind in inner.kinds]
        made = inner.attach(wanted, context)
        wrong = sorted({f"{site.name}: {reason}" for site, delta in made.deltas.items() if (reason := _ungateable(delta))})
        if wrong:
            raise RefusedError(f"a delta of '{inner.name}' cannot be gated", problems=wrong[:8],
                               hint="Gate methods that change a layer's output, or a prefix.")
        known = set(wanted)
        return Attachment({site: self._gated(site, delta, context) if site in known else delta
                           for site, delta in made.deltas.items()}, made.shared)

    def _gated(self, site: Site, delta: Delta, context: AttachContext) -> Delta:
        average = _averaging(context.model, site)
        if average is not None:
            context.layout.watch(average)
        gate = Gate(_width(site, delta, context), self.start, context.layout, average)
        return GatedPrefix(delta, gate) if isinstance(delta, PrefixDelta) else GatedDelta(delta, gate)

    def controller(self, attachment: Attachment, plan: StepPlan) -> Controller | None:
        """That of the gated method."""
        return self.inner().controller(_without_gates(attachment), plan)

    def warm_up(self, attachment: Attachment) -> WarmUp | None:
        """That of the gated method."""
        return self.inner().warm_up(_without_gates(attachment))

    def fit(self, attachment: Attachment, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The gated method's deltas get the sizes of theirs."""
        inside = {name.replace(f":{INSIDE}.", ":", 1): shape for name, shape in shapes.items()}
        self.inner().fit(_without_gates(attachment), inside)


def _without_gates(attachment: Attachment) -> Attachment:
    deltas = {site: delta.delta if isinstance(delta, GatedDelta | GatedPrefix) else delta
              for site, delta in attachment.deltas.items()}
    return Attachment(deltas, attachment.shared)


def _ungateable(delta: Delta) -> str:
    """Why there is nothing to scale; empty if there is."""
    if isinstance(delta, InputDelta):
        return "rows in front of the embeddings stay there whatever their size is"
    if type(delta).override is not Delta.override or type(delta).increments is not Delta.increments:
        return "it changes the layer's own tensors, which are the same for every input"
    return ""


def _width(site: Site, delta: Delta, context: AttachContext) -> int:
    """The width of the vectors that the gate reads."""
    if isinstance(delta, PrefixDelta):
        return next(affine_shape(layer)[1] for layer in context.layer(site).modules() if is_affine(layer))  # all read the same
    return site.d_out if site.kind == "embedding" else site.d_in


def _averaging(model: nn.Module, site: Site) -> str | None:
    """The module whose calls say which tokens of a row are real, for a site in a stack whose tokens see the whole row.

    None for causal stacks, for layers outside the blocks, and where the attention modules do not say that they look both ways.
    """
    if site.layer is None:
        return None
    words = {vars(module)["is_causal"] for module in model.get_submodule(site.stack).modules() if "is_causal" in vars(module)}
    if words != {False}:
        return None
    parts = site.stack.split(".")
    above = [".".join(parts[:count]) for count in range(len(parts), -1, -1)]
    return next((path for path in above if isinstance(model.get_submodule(path), PreTrainedModel)), None)
