"""Intrinsic: the parameters of any other method move in a random subspace of a few dimensions.

    theta_i = theta0_i + scale_i * (P z)_i,     z (d,) trained, zero at first; P fixed and random

Reparameterisation-based delta tuning. theta are the trainable tensors of the method in `over`, i the layers that it changes, and
P a structured random matrix with unit columns (Fastfood), of which only the seed is kept: the file holds z alone, whatever the
method in `over` would save. The smallest d that reaches 90% of what that method reaches is the intrinsic dimension of a task;
`deltaloom subspace d90` finds it. With `scale: learned` each layer has one trained factor more (structure-aware, SAID), and
`dimension` counts these.

theta0 and P come from `seed`, whatever the run's own seed is, through a Philox4x64-10 counter generator and whole-number
arithmetic, so that the settings give the same bits on every machine; initial values that are computed (by matrix products or
decompositions) are refused for this reason. P has unit columns, so that one step of Adam moves theta by the learning rate times
sqrt(d / D), D being the numbers in theta: rates have to be higher than for the method itself, by about sqrt(D / d).
Li et al. 2018 (arXiv 1804.08838); Aghajanyan et al. 2021 (2012.13255); Fastfood: Le, Sarlos and Smola 2013. It is a tool
to measure tasks with, and gives the smallest files; it is seldom the best method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from deltaloom.deltas._subspace import RepeatableDraws, Subspace, trainable, within, without
from deltaloom.deltas.base import AttachContext, Attachment, Method, PeftPart, StepPlan, method_from
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.sites import Kind, Site

LONG = 10 ** 6     # steps of a run that is long enough for any schedule
VALUES = 3         # the stream of the initial values; the projection has those below


class Intrinsic(Method):
    """Another method in a random subspace."""

    name: ClassVar[str] = "intrinsic"
    kinds: ClassVar[tuple[Kind, ...]] = get_args(Kind)

    targets: str | tuple[str, ...] = "over"
    """Which sites; `over`: those that the method in `over` takes."""
    over: dict[str, Any]
    """The method whose parameters move, with its settings, as an entry of `deltas` has them."""
    dimension: int = Field(200, ge=1)
    """Trained numbers."""
    scale: float | Literal["learned"] = 1.0
    """Factor of the change, for all layers; `learned`: one for each layer, 1 at first."""
    seed: int = Field(0, ge=0, lt=4096)
    """What the projection and the initial values of `over` come from."""

    @field_validator("over")
    @classmethod
    def _check_over(cls, over: dict[str, Any]) -> dict[str, Any]:
        if isinstance(method_from(over, "over"), Intrinsic):
            raise ValueError("a subspace of a subspace is a smaller subspace: lower the dimension instead")
        return over

    @model_validator(mode="after")
    def _check_scale(self) -> Self:
        if isinstance(self.scale, float) and self.scale <= 0:
            raise ValueError(f"scale must be above 0, got {self.scale:g}")
        return self

    def inner(self) -> Method:
        """The method in `over`, at the sites that are asked for here."""
        places: dict[str, Any] = {"targets": self.targets} if self.targets != "over" else {}
        places |= {"layers": self.layers} if self.layers is not None else {}
        return method_from({**self.over, **places}, "over")

    def sites(self, model: nn.Module) -> list[Site]:
        """Those of the method in `over`."""
        return self.inner().sites(model)

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """The method's own deltas with its parameters replaced by what z makes of them.

        Raises:
            RefusedError: its initial values are not the same every time, or its parameters change their shapes in training.
            SettingsError: more dimensions than it has parameters.
        """
        inner = self.inner()
        own = [site for site in sites if site.kind in inner.kinds]
        made, again = self._made(inner, own, context), self._made(inner, own, context)
        modules, others = ([*part.deltas.values(), *part.shared.values()] for part in (made, again))
        if not all(torch.equal(one[3], other[3]) for one, other in zip(trainable(modules), trainable(others), strict=True)):
            raise RefusedError(f"'{inner.name}' starts from values that a seed does not repeat", hint="Choose another `init`.")
        if inner.controller(made, StepPlan(LONG)) is not None or inner.warm_up(made) is not None:
            raise RefusedError(f"'{inner.name}' decides sizes or values while training, which a fixed subspace cannot follow",
                               hint="Take a method whose parameters stay, such as a low-rank change of fixed rank.")
        return within(made, self._subspace)

    def _made(self, inner: Method, sites: Sequence[Site], context: AttachContext) -> Attachment:
        # never with a tokenizer: a saved delta is attached without one, and has to start from the same values
        with RepeatableDraws(self.seed, VALUES):
            return inner.attach(sites, AttachContext(context.model, fixed=context.fixed))

    def _subspace(self, modules: Sequence[nn.Module]) -> Subspace:
        learned = self.scale == "learned"
        most = sum({id(parameter): parameter.numel() for _, _, _, parameter in trainable(modules)}.values())
        least = len(modules) + 1 if learned else 1
        if not least <= self.dimension <= most + (len(modules) if learned else 0):
            raise SettingsError(f"{self.name}: this dimension cannot be", got=self.dimension,
                                legal=f"{least} to {most}" + (f", of which {len(modules)} are scales" if learned else ""),
                                hint="`over` has no more parameters." if self.dimension > most else "")
        return Subspace(modules, self.dimension, None if isinstance(self.scale, str) else self.scale, self.seed)

    def to_peft(self, attachment: Attachment, model: nn.Module) -> PeftPart:
        """What the method in `over` would write of these values."""
        return self.inner().to_peft(without(attachment), model)
