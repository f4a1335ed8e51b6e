"""Tucker-1 tensor delta: one basis of the residual stream shared by all layers, and private factors with adaptive ranks.

    reads the stream (all others):       change of layer l = scale * up_l B_in            B_in (K, d_in), up_l (d_out, K)
    writes to it (roles o and down):     change of layer l = scale * B_out^T down_l       B_out (K, d_out), down_l (K, d_in)

Every layer of a block reads the residual stream or writes to it. The layers' gradients share their main directions on the side
of the stream and hardly any on the other. So that side has one basis for all layers, whatever their role (the factor of one mode
of the stacked increments), and the other side is private. The basis costs next to nothing, so that at equal parameters a layer
has nearly twice LoRA's rank. An encoder-decoder's two streams share the bases if they are of one width.

Bases start orthonormal, random or spanning most of the gradients of a few batches; they train as the rest does and are kept near
orthonormal by a step of their own after the optimizer's. Private factors start at zero, so that nothing changes at birth. Which
rows of the basis a layer keeps is decided while training by the importance of its private rows, under one budget over all layers
that counts private parameters, as in AdaLoRA (Zhang et al. 2023, arXiv 2303.10512); the bases keep their size.
Tucker 1966 (Tucker-1 has a factor matrix for one mode); FacT (2212.03145) and LoTR (2402.01376) share the bases of both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from deltaloom.allocation import Schedule
from deltaloom.deltas._adaptive import AdaptiveMethod, Policy, Pool, RankController, Rows, silence_rows
from deltaloom.deltas._orthogonality import residual, step_towards
from deltaloom.deltas._triplets import orthonormal_rows
from deltaloom.deltas.base import (
    AttachContext,
    Attachment,
    Controller,
    KeepRows,
    LowRankDelta,
    StepPlan,
    WarmUp,
    shapes_at,
)
from deltaloom.errors import NonFiniteError, SettingsError
from deltaloom.sites import Site

WRITES = ("o", "down")  # roles of layers whose output is added to the residual stream
SKETCH = 16             # random directions beyond the basis in which gradients are looked at


class Basis(nn.Module):
    """Rows (K, d) that all layers of one side share."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)


class Tucker1Delta(LowRankDelta):
    """One layer's private factor, whose rows go with rows of the shared basis."""

    mask: Tensor
    chosen: Tensor

    def __init__(self, basis: Basis, private: int, writes: bool, scale: float, dropout: float) -> None:
        super().__init__()
        size = len(basis.rows)
        self.held = (basis,)  # in a tuple: the basis is registered once, beside the deltas
        self.private = nn.Parameter(torch.zeros(size, private))
        self.register_buffer("mask", torch.ones(size, dtype=torch.bool))
        self.register_buffer("chosen", torch.arange(size))
        self.writes, self.scale, self.dropout = writes, scale, dropout

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """down, the constant scale, up: one of them rows of the basis."""
        basis = self.held[0].rows
        rows = basis if len(self.chosen) == len(basis) else basis[self.chosen]
        private = self.private if self.training else self.private * self.mask[:, None]
        scale = rows.new_full((len(rows),), self.scale)
        return (private, scale, rows.T) if self.writes else (rows, scale, private.T)

    def orthogonality(self) -> float | None:
        """The basis' deviation from orthonormal rows."""
        return residual(self.held[0].rows.detach()[None])

    # ---- what the controller does with the rows -------------------------------------------------------------------

    def parts(self) -> list[Rows]:
        """The private factor."""
        return [Rows(self.private)]

    def silence(self) -> None:
        """A row of zeros in the private factor does nothing."""
        silence_rows(self.private, self.mask)

    def alive(self) -> Tensor:
        """Those with a row that is not zero."""
        return self.private.detach().flatten(1).any(1)

    def numbers(self) -> Tensor:
        """Trained numbers of each row, (K,)."""
        return torch.full((len(self.private),), float(self.private.shape[1]), dtype=torch.float64)

    def keep(self, components: Tensor, keep_rows: KeepRows) -> None:
        """Remove all rows but these."""
        self.private = keep_rows(self.private, components)
        self.mask, self.chosen = self.mask[components], self.chosen[components]

    def fit(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """As many rows as saved tensors of these shapes have."""
        for name, tensor in self.state_dict(keep_vars=True).items():
            shape = shapes.get(name, ())
            if len(shape) == tensor.ndim and shape[1:] == tuple(tensor.shape[1:]) and shape != tuple(tensor.shape):
                tensor.data = tensor.data.new_zeros(shape)

    def orthonormalise(self, strength: float) -> None:
        """Nothing: private factors are not orthonormal, and the bases have their own."""

    def residual(self) -> float:
        """As `orthogonality`."""
        return self.orthogonality() or 0.0


class Tucker1(AdaptiveMethod):
    """A shared basis of the residual stream and private factors."""

    name: ClassVar[str] = "tucker1"

    basis: Literal["random", "gradient"] = "random"
    """Where the bases start: random, or at the main directions of the gradients of a few batches. The latter learns faster at
    small learning rates and worse at the best ones (docs/results/adaptive.md)."""
    size: int | None = Field(None, ge=1)
    """Rows of each basis, which is the rank that training starts with; if not given, rank times reserve (rule `fixed`: rank)."""
    scale: float = Field(2.0, gt=0)
    """Factor of the change, the same whatever the ranks are; as LoRA's ratio of alpha to rank."""
    rule: Literal["budget", "capped", "share", "effective", "fixed"] = "budget"
    """From scores to ranks. `budget`: the schedule alone. `capped`: the effective number of rows within its limits. `share`: all
    that reach a tenth of the previous mean score. `effective`: the effective number alone. `fixed`: ranks stay as they are, at
    `rank`. Only the first two keep the budget."""
    orthogonality: float = Field(0.1, ge=0, lt=1)
    """Strength of the bases' step towards orthonormal rows after the optimizer's (0.5 is one of Newton-Schulz's)."""
    warm_up_batches: int = Field(4, ge=1)
    """Batches whose gradients are looked at before the first step."""

    @model_validator(mode="after")
    def _check_fixed_rank(self) -> Self:
        if self.rule == "fixed" and self.rank != (self.size or int(self.rank)):
            raise ValueError("with rule 'fixed' every layer keeps all rows of its basis, so that rank must be a whole number, "
                             f"and size the same if it is given; got rank {self.rank:g} and size {self.size}")
        return self

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """One basis for each side and width, and a private factor for every site.

        Raises:
            SettingsError: bases with more rows than a layer can use, or fewer than the rank.
        """
        size = self.size or (int(self.rank) if self.rule == "fixed" else self.initial_rank())
        self.check_ranks(sites, size)
        if self.rank > size:
            raise SettingsError(f"{self.name}: the final rank is more than the basis has rows", got=f"rank {self.rank:g}",
                                legal=f"at most {size}", hint="Raise size, or lower rank.")
        bases: dict[str, Basis] = {}
        deltas = {}
        for site in sites:
            writes = site.role in WRITES
            width, private = (site.d_out, site.d_in) if writes else (site.d_in, site.d_out)
            name = f"{'out' if writes else 'in'}-{width}"
            if name not in bases:
                rows = torch.zeros(size, width) if context.loading else orthonormal_rows(size, width, context.generator)
                bases[name] = Basis(rows)
            deltas[site] = Tucker1Delta(bases[name], private, writes, self.scale, self.dropout)
        return Attachment(dict(deltas), dict(bases))

    def controller(self, attachment: Attachment, plan: StepPlan) -> Controller | None:
        """Private rows under one budget, counted in parameters; and orthonormal bases.

        Raises:
            SettingsError: the budget is less than the largest row takes.
        """
        deltas = {site: delta for site, delta in attachment.deltas.items() if isinstance(delta, Tucker1Delta)}
        bases = [basis for basis in attachment.shared.values() if isinstance(basis, Basis)]
        pools = [_pool(site, delta) for site, delta in deltas.items()]
        policy = None
        if self.rule != "fixed":
            schedule = Schedule.of_run(plan.total_steps, self.start, self.end, self.every)
            target = sum(self.rank * delta.private.shape[1] for delta in deltas.values())
            largest = max(delta.private.shape[1] for delta in deltas.values() if len(delta.private))
            if self.rule in ("budget", "capped") and target < largest:
                raise SettingsError(f"{self.name}: the budget is too small to keep anything", got=f"{target:.0f} parameters",
                                    legal=f"at least {largest}, which is one row", hint="Raise rank.")
            policy = Policy(self.rule, self.importance, self.beta1, self.beta2, schedule, target, "layer")
        elif not self.orthogonality:
            return None
        return _BasisController(bases, self.orthogonality, RankController(pools, policy, plan))

    def warm_up(self, attachment: Attachment) -> WarmUp | None:
        """For `gradient`, the main directions of all layers' gradients on the shared side."""
        if self.basis != "gradient":
            return None
        deltas = {site: delta for site, delta in attachment.deltas.items() if isinstance(delta, Tucker1Delta)}
        return _MainDirections(deltas, self.warm_up_batches)

    def fit(self, attachment: Attachment, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The ranks of the saved tensors."""
        for site, delta in attachment.deltas.items():
            if isinstance(delta, Tucker1Delta):
                delta.fit(shapes_at(shapes, f"{site.name}:"))


class _BasisController(Controller):
    """The rank controller, and a step of the bases towards orthonormal rows after each of its own."""

    def __init__(self, bases: Sequence[Basis], strength: float, ranks: RankController) -> None:
        self.bases, self.strength, self.ranks = list(bases), strength, ranks

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Ranks first."""
        self.ranks.after_step(step)
        if self.strength:
            for basis in self.bases:
                basis.rows.copy_(step_towards(basis.rows[None], self.strength)[0])

    def grow(self, factor: float, most: int | None) -> int:
        """Of private rows, by the rank controller."""
        return self.ranks.grow(factor, most)

    def reserve(self) -> int:
        """The numbers of the private rows that wait."""
        return self.ranks.reserve()

    def finish(self) -> None:
        """As the rank controller."""
        self.ranks.finish()

    def state_dict(self) -> dict[str, object]:
        """The rank controller's."""
        return self.ranks.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take back what `state_dict` gave."""
        self.ranks.load_state_dict(state)


class _MainDirections(WarmUp):
    """Bases that hold as much as they can of all layers' gradients: their left singular vectors, from random sketches."""

    def __init__(self, deltas: Mapping[Site, Tucker1Delta], batches: int) -> None:
        self.batches = batches
        self.deltas = dict(deltas)
        self.sketches: dict[Site, Tensor] = {}
        self.random = torch.Generator().manual_seed(0)
        self.directions: dict[tuple[int, int], Tensor] = {}

    def observe(self, site: Site, x: Tensor, gradient: Tensor) -> None:
        """Adds the gradient's matrix, of its shared side by random directions of the other one."""
        delta = self.deltas.get(site)
        if delta is None:
            return
        shared, other = (gradient, x) if delta.writes else (x, gradient)
        key = (other.shape[1], len(delta.held[0].rows) + SKETCH)
        if key[0] > key[1]:  # a layer that is narrow on its private side is looked at as it is
            if key not in self.directions:
                self.directions[key] = torch.randn(*key, generator=self.random)
            other = other @ self.directions[key].to(other)
        sketch = shared.T @ other
        self.sketches[site] = self.sketches[site] + sketch if site in self.sketches else sketch

    @torch.no_grad()
    def finish(self) -> None:
        """Set the bases; each layer's gradient counts the same, whatever its size.

        Raises:
            NonFiniteError: a gradient has NaN or infinite entries.
        """
        bad = [site.name for site, sketch in self.sketches.items() if not bool(sketch.isfinite().all())]
        if bad:
            raise NonFiniteError("gradients of the warm-up are not finite", problems=bad[:20],
                                 hint="Look at the first batches and at the base's precision.")
        found: dict[int, tuple[Basis, list[Tensor]]] = {}
        for site, sketch in self.sketches.items():
            basis = self.deltas[site].held[0]
            norm = sketch.norm()
            if norm > 0:
                found.setdefault(id(basis), (basis, []))[1].append(sketch / norm)
        for basis, sketches in found.values():
            stacked = torch.cat(sketches, 1).double()
            vectors = torch.linalg.eigh(stacked @ stacked.T).eigenvectors.flip(1)
            basis.rows.copy_(vectors[:, :len(basis.rows)].T)


def _pool(site: Site, delta: Tucker1Delta) -> Pool:
    layer = site.layer or 0
    return Pool(delta, f"{site.role} {site.d_out}x{site.d_in}", row=lambda: torch.full_like(delta.chosen, layer))
