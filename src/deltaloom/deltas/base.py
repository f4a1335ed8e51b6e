"""The contract of deltas, methods and controllers.

        x ---- before ---> [ frozen layer, with override + increments ] ---- y ---> after ---> new y

A delta is the trainable change at one site; a method is the settings that make the deltas of a set of sites; a controller
changes deltas while training. A list of deltas nests: the k-th sees the layer with the deltas 1..k-1 as "the layer".
Overrides come first, whatever their position: they replace the layer's own tensors. Increments are added to these next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from pydantic import field_validator
from torch import Tensor, nn

from deltaloom.compact.face import affine_weight
from deltaloom.deltas._layout import BatchLayout
from deltaloom.deltas.presets import KEY, expanded, preset_names
from deltaloom.errors import RefusedError, SettingsError, did_you_mean
from deltaloom.events import Emitter
from deltaloom.kernels.dropout import dropout
from deltaloom.registry import class_named, names_in
from deltaloom.settings import Settings
from deltaloom.sites import Kind, Site, find_sites, stack_matrices


class Delta(nn.Module, ABC):
    """One site's change. It changes nothing at birth, unless the class says why it does."""

    # A reason why this delta changes the model already at birth (a prefix does); empty for all others.
    changes_at_birth: ClassVar[str] = ""

    def before(self, x: Tensor) -> Tensor:
        """New input of the layer, from its input x (..., d_in).

        Not for a part of a fused layer, whose other parts read the same input, nor for a branch: `attach` has to refuse these.
        """
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """New output, from the layer's input x (..., d_in) and output y (..., d_out). On embeddings x holds ids."""
        return y

    def override(self) -> dict[str, Tensor]:
        """Trainable replacements of the layer's own tensors, by their names in the layer; always whole tensors."""
        return {}

    def increments(self) -> dict[str, Tensor]:
        """Increments of the layer's own tensors, by their names in the layer: added to them before the layer runs.

        For layers that are no plain affine map. At a stack site the increment of `site.tensor` is (slices, d_out, d_in), however
        the layer stores it; any other tensor's has that tensor's own shape. Several deltas may add to one tensor. Merging adds
        them exactly, so that a delta that does nothing else needs no `fold`.
        """
        return {}

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of the affine layer that equals the layer with this delta.

        weight is (d_out, d_in) in float32 or float64 whatever the layer's storage: transposed for Conv1D and for embeddings,
        whose d_in is the vocabulary; (d,) for a norm. With part sites it holds the rows of the part.

        Raises:
            RefusedError: the change is not an affine one; the message says why.
        """
        raise RefusedError(f"a {type(self).__name__} cannot be folded into the layer's weights",
                           hint="Keep the delta next to the model.")

    def penalty(self) -> Tensor | None:
        """A scalar that the loop adds to the loss and reports apart from it; None for none."""
        return None

    def orthogonality(self) -> float | None:
        """Largest ||X^T X - I||_F / sqrt(r) of the factors X (n, r) that this delta keeps orthonormal; None: it keeps none."""
        return None


class LowRankDelta(Delta, ABC):
    """y + ((x @ down.T) * scale) @ up.T: gives after, fold, export and the fused kernel from its factors."""

    dropout: float = 0.0

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """down (r, d_in), scale (r,), up (d_out, r); they carry gradients to this delta's parameters."""

    def rounded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """down and up in a dtype, without gradients, where other layers have the same: cast once for all; else None."""
        return None

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y plus the low-rank product; on embeddings (ids) the columns of `down` are looked up."""
        down, scale, up = (factor.to(y.dtype) for factor in self.factors())
        if not x.is_floating_point():
            return y + (nn.functional.embedding(x, down.T) * scale) @ up.T
        x = dropout(x, self.dropout, self.training)
        return y + ((x @ down.T) * scale) @ up.T

    def matrix(self) -> Tensor:
        """The change as one (d_out, d_in) matrix."""
        down, scale, up = self.factors()
        return (up * scale) @ down

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """weight + up diag(scale) down."""
        down, scale, up = (factor.detach().to(weight.dtype) for factor in self.factors())
        return weight + (up * scale) @ down, bias


class PrefixDelta(Delta, ABC):
    """Keys and values in front of an attention site."""

    # Whether they are hidden from a query that sees one key of the text alone: the first token of a causal row.
    spares_first: bool = False
    # Whether `log_gate` gives anything, so that somebody has to keep for it what the attention module reads.
    gates: bool = False

    @abstractmethod
    def keys_values(self) -> tuple[Tensor, Tensor]:
        """keys and values, each (length, kv_heads, head_dim), seen by queries before the keys of the text."""

    def log_gate(self, x: Tensor) -> Tensor | None:
        """What is added to the scores of these keys, from what the attention module reads, x (batch, time, width); None: nothing.

        (batch, time), one for each query, or (rows, 1), one for each row, or (rows, 1, length), one for each key and row; packed
        rows are (1, time), or one each.
        """
        return None


class InputDelta(Delta, ABC):
    """Rows in front of the input embeddings."""

    @abstractmethod
    def rows(self) -> Tensor:
        """(length, d_model), or (rows, length, d_model) where each row of the call has its own."""


@dataclass(frozen=True)
class AttachContext:
    """What a method may read while it makes its deltas: the untouched model, its tokenizer if there is one, a generator."""

    model: nn.Module
    tokenizer: Any = None
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    fixed: frozenset[str] = frozenset()  # names of parameters that the model itself does not train, such as position tables
    loading: bool = False                # saved values replace the initial ones right after: none from weights or text are needed
    layout: BatchLayout = field(default_factory=BatchLayout)  # for deltas that look at whole rows of a call

    def layer(self, site: Site) -> nn.Module:
        """The frozen layer at a site."""
        return self.model.get_submodule(site.path)

    def weight(self, site: Site) -> Tensor:
        """The site's frozen weight as (d_out, d_in) in float32 (rows of its part, if it is one); of a stack all matrices,
        (slices, d_out, d_in)."""
        layer = self.layer(site)
        if site.kind == "stack":
            return stack_matrices(site, layer.get_parameter(site.tensor).detach().float())
        weight = affine_weight(layer, torch.float32).detach()
        return weight[slice(*site.part)] if site.part else weight


def master_copy(tensor: Tensor) -> nn.Parameter:
    """A trainable copy of a frozen tensor, in float32 at least: small updates would be lost in 16 bits."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return nn.Parameter(tensor.detach().to(dtype, copy=True))


@dataclass
class Attachment:
    """What a method made: a delta for each site, and modules that several deltas share, by name."""

    deltas: dict[Site, Delta]
    shared: dict[str, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True)
class PeftPart:
    """What PEFT's files hold of one adapter, or of one method's share of it."""

    config: dict[str, Any]      # fields of adapter_config.json; `target_modules` are whole module paths
    tensors: dict[str, Tensor]  # by PEFT's names without their leading "base_model.model."


@dataclass(frozen=True)
class PeftReading:
    """What a method found in PEFT's files: its settings, its tensors by site name and own name, the names it has read."""

    method: Method
    state: dict[str, dict[str, Tensor]]
    used: frozenset[str]


@dataclass(frozen=True)
class Components:
    """How one delta falls apart into components that can be kept or dropped one by one.

    `axes`: for every trained tensor of the delta the axis that counts components; None: the tensor is the only component.
    `zero`: the tensor that makes a component do nothing where its share of it is zero; empty for rows of a prefix or prompt,
    which are hidden instead. `constants`: buffers with one entry a component, all of them equal.
    """

    axes: Mapping[str, int | None]
    zero: str = ""
    constants: tuple[str, ...] = ()


class KeepRows(Protocol):
    """As `keep_rows`."""

    def __call__(self, parameter: nn.Parameter, rows: Tensor, axis: int = 0) -> nn.Parameter:
        """The new parameter."""


def keep_rows(parameter: nn.Parameter, rows: Tensor, axis: int = 0) -> nn.Parameter:
    """A new parameter of some rows of another, or slices along another axis, with their gradient.

    A new one, because autograd remembers the shape of the old one as long as any earlier loss is alive.
    """
    kept = nn.Parameter(parameter.data.index_select(axis, rows).contiguous(), requires_grad=parameter.requires_grad)
    kept.grad = None if parameter.grad is None else parameter.grad.index_select(axis, rows).contiguous()
    return kept


@dataclass(frozen=True)
class StepPlan:
    """What a controller knows of the run, and what it may use of it."""

    total_steps: int                     # optimizer steps
    emit: Emitter = field(default_factory=Emitter)
    keep_rows: KeepRows | None = None    # as `keep_rows`, the optimizer taking the new parameter in the old one's place; without
                                         # it nothing is removed before the end
    on_demand: bool = False              # sizes begin at their smallest and change by `Controller.grow` alone


@dataclass(frozen=True)
class Outcome:
    """A plain method, and its deltas' tensors by site name."""

    method: Method
    state: Mapping[str, Mapping[str, Tensor]]


class WarmUp(ABC):
    """Initial values from the gradients of a few batches: before the first step, the untouched deltas see them pass.

    The run calls `observe` for every site in every batch, without changing anything, and then `finish` once.
    """

    batches: int

    @abstractmethod
    def observe(self, site: Site, x: Tensor, gradient: Tensor) -> None:
        """The layer's input (n, d_in) and the loss gradient with respect to its output (n, d_out), in float32."""

    @abstractmethod
    def finish(self) -> None:
        """Set the initial values."""


class Controller(ABC):
    """Changes deltas while training; its whole state is in the checkpoint."""

    def after_backward(self, step: int) -> None:
        """Called once per optimizer step, on the complete, unclipped, finite gradient; steps count from 1."""
        return

    def after_step(self, step: int) -> None:
        """Called after the optimizer's step."""
        return

    def grow(self, factor: float, most: int | None) -> int:
        """Let more of a reserve act, of a run whose plan says `on_demand`; gives back by how many trained numbers it grew.

        To `factor` times what acts now, or by the smallest piece if that is more, and by `most` numbers at most.
        """
        return 0

    def reserve(self) -> int:
        """How many trained numbers wait to be grown."""
        return 0

    def finish(self) -> None:
        """Called at the end of training: physical removal of what was masked."""
        return

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit: tensors, numbers, strings."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


class Method(Settings, ABC):
    """Settings that make deltas for a set of sites. One file under deltas/ each; `name` is the file's name."""

    name: ClassVar[str]
    kinds: ClassVar[tuple[Kind, ...]] = ("linear",)
    peft_types: ClassVar[tuple[str, ...]] = ()   # values of PEFT's `peft_type` that this method reads and writes
    peft_fields: ClassVar[tuple[str, ...]] = ()  # fields by which it is part of another method's PEFT adapter
    asked_as: ClassVar[Mapping[str, str]] = {}   # names that are no method, and how this one does what they ask for
    offers: ClassVar[Mapping[str, Any] | None] = None  # its settings in a choice where none are given; None: not in it

    targets: str | tuple[str, ...] = "all-linear"
    """Which sites: words, names, roles, globs, `re:` expressions; see `deltaloom.sites.find_sites`."""

    layers: str | tuple[int, ...] | None = None
    """Only these blocks: a list of indices, or ranges such as "0-3,8"."""

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, value: str | tuple[int, ...] | None) -> str | tuple[int, ...] | None:
        layer_indices(value)
        return value

    def sites(self, model: nn.Module) -> list[Site]:
        """The sites of an untouched model that this method's targets name.

        Raises:
            TargetError: a target matches nothing.
        """
        return find_sites(model, self.targets, self.kinds, layer_indices(self.layers))

    def settled(self, base: Path) -> Method:
        """The same settings with the files that they name made definite: whole paths, seen from a run file's folder, and hashes.

        Raises:
            CheckpointError: such a file is missing or damaged.
        """
        return self

    @abstractmethod
    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """Deltas for all its sites at once (a tensor method shares parameters across them). Changes nothing in the model."""

    def controller(self, attachment: Attachment, plan: StepPlan) -> Controller | None:
        """What changes these deltas while training; None for methods that stay as they are."""
        return None

    def warm_up(self, attachment: Attachment) -> WarmUp | None:
        """What these deltas want to see before the first step of a new run; None for methods that start as they are."""
        return None

    def fit(self, attachment: Attachment, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Make newly attached deltas fit saved tensors, whose shapes `shapes` holds by `site name:tensor name`.

        Only for methods whose tensors change their shapes in training; for all others a misfit is an error later.
        """
        return

    def components(self, delta: Delta) -> Components:
        """How one of this method's deltas falls apart, for a choice among methods.

        Raises:
            RefusedError: it does not, or not with these settings.
        """
        raise RefusedError(f"'{self.name}' has no components that can be kept or dropped one by one",
                           hint="Choose from methods that have: `deltaloom methods auto` names them.")

    def resized(self, site: Site, count: int) -> dict[str, Any]:
        """What is to be set otherwise, so that a site has that many components, each doing there what it does now."""
        return {}

    def settled_as(self, attachment: Attachment) -> tuple[Outcome, ...] | None:
        """After training: the plain methods, in order, that these deltas are now; None: this one as it stands."""
        return None

    def to_peft(self, attachment: Attachment, model: nn.Module) -> PeftPart:
        """These deltas as PEFT holds them; `model` is the bare model.

        Raises:
            RefusedError: PEFT has no such method, or not with these settings.
        """
        raise RefusedError(f"PEFT has no counterpart of '{self.name}'", hint="Keep the native format.")

    @classmethod
    def from_peft(cls, adapter: PeftPart, model: nn.Module) -> PeftReading | None:
        """What an adapter of one of `peft_types`, or with one of `peft_fields`, holds for this method; None if nothing.

        Raises:
            RefusedError: a field changes the meaning in a way that this method does not have.
        """
        return None


def shapes_at(shapes: Mapping[str, tuple[int, ...]], place: str) -> dict[str, tuple[int, ...]]:
    """The shapes whose names begin with `place`, by the rest of their names: of one module, for `Method.fit`."""
    return {name.removeprefix(place): shape for name, shape in shapes.items() if name.startswith(place)}


def method_from(record: dict[str, Any], where: str = "deltas") -> Method:
    """The method that a record of a run file or checkpoint states: {"method": name, setting: value, ...}.

    Raises:
        SettingsError: no such method, an unknown setting or an illegal value; `where` is the key path that it names.
    """
    name = record.get("method")
    if not isinstance(name, str):
        raise SettingsError(f"{where}: each entry needs 'method: NAME'", got=record)
    legal = names_in("deltaloom.deltas")
    if name not in legal:
        answers = [_class(each).asked_as.get(name) for each in legal]
        if name in preset_names():
            answers.append(f"That is a preset: write {{{KEY}: {name}}}.")
        hint = next((answer for answer in answers if answer), did_you_mean(name, legal))
        raise SettingsError(f"{where}: unknown method", got=name, legal=legal, hint=hint)
    cls = _class(name)
    return cls.parse({key: value for key, value in record.items() if key != "method"}, f"{where} ({name})")


def methods_from(entries: Sequence[Mapping[str, Any]], where: str = "deltas") -> tuple[Method, ...]:
    """The methods that a list states, with the list of each preset in its place.

    Raises:
        SettingsError: as `method_from`; no such preset.
    """
    return tuple(method_from(record, place) for place, record in expanded(entries, where))


def methods_offered() -> tuple[Method, ...]:
    """Every method that offers itself for a choice among methods, with the settings that it offers."""
    classes = [_class(name) for name in names_in("deltaloom.deltas")]
    return tuple(cls(**cls.offers) for cls in classes if cls.offers is not None)


def _class(name: str) -> type[Method]:
    return class_named("deltaloom.deltas", name, Method, "method")  # type: ignore[type-abstract]


def method_record(method: Method) -> dict[str, Any]:
    """The record that `method_from` reads back: the name and every setting, defaults included."""
    return {"method": method.name, **method.as_dict()}


def layer_indices(layers: str | Iterable[int] | None) -> list[int] | None:
    """[0, 1, 2, 3, 8] from "0-3,8"; None stays None."""
    if layers is None:
        return None
    if not isinstance(layers, str):
        return list(layers)
    found: list[int] = []
    for piece in layers.split(","):
        first, _, last = piece.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ValueError(f"layers must be indices or ranges such as '0-3,8', got {layers!r}")
        found.extend(range(int(first), int(last or first) + 1))
    return found
