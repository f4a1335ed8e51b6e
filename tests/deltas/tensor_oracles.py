"""Oracles for tensor deltas: a group's dense changes by the definition of its transform, and a bare training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from deltaloom.deltas._tensor_group import STARTS, TensorGroup
from deltaloom.deltas._triplets import Triplets
from deltaloom.deltas.base import AttachContext, StepPlan
from deltaloom.deltas.tsvd import TSVD, TsvdDelta, TsvdStackDelta
from deltaloom.events import Emitter
from deltaloom.linalg import LayerTransform, reconstruct, rotation, transforms
from deltaloom.sites import Site
from deltaloom.train.modes import training_mode
from deltaloom.train.optimizer import row_keeper
from deltaloom.tuned import Tuned, attach
from tests.contract.cases import perturb
from tests.toys import toy_batch

TRANSFORMS = ("identity", "dft", "dct", "haar", "data", "learned", "frame")
ORTHONORMAL = TRANSFORMS[:-1]
REAL = tuple(name for name in TRANSFORMS if name != "dft")


def gram(count: int) -> Tensor:
    root = torch.randn(count, count + 1, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    return root @ root.T


def transform_of(name: str, layers: int, skew: Tensor | None = None) -> LayerTransform:
    """In float64; a group keeps its coefficients in float32."""
    if name == "data":
        return transforms.data(gram(layers))
    start = STARTS[name](layers)
    return start if skew is None else LayerTransform(rotation(skew.detach(), start.weights), None, start.width)


def new_group(name: str, layers: int, rank: int = 2, d_out: int = 6, d_in: int = 5, scale: float = 1.5, seed: int = 0,
              shaken: bool = True) -> TensorGroup:
    """A group in float64 with the transform's coefficients in full precision, and, if `shaken`, random values."""
    generator = torch.Generator().manual_seed(seed)
    site = Site("layer", "linear", "q", d_in, d_out)
    group = TensorGroup(name, layers, rank, site, scale, AttachContext(nn.Module(), generator=generator)).double()
    with torch.no_grad():
        if shaken:
            for parameter in group.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        if name == "data":
            group.set_transform(transform_of(name, layers))
        start = transform_of(name, layers)
        group.weights.copy_(start.weights)
        if start.turns is not None:
            group.turns.copy_(start.turns)
    return group


def by_frequency(triplets: Triplets, transform: LayerTransform) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """u, s and v of each frequency as `linalg.reconstruct` takes them: of pairs the real parts first, then the imaginary ones."""
    us, ss, vs = [], [], []
    for frequency, width in enumerate(transform.width):
        own = [e for e in range(len(triplets.core)) if int(triplets.block[e]) == frequency]
        rows = [[row for row in range(len(triplets.owner)) if int(triplets.owner[row]) == e] for e in own]
        order = [each[part] for part in range(width) for each in rows]
        us.append(triplets.up.detach()[order].T.double())
        vs.append(triplets.down.detach()[order].T.double())
        ss.append(triplets.core.detach()[own, 0].double())
    return us, ss, vs


def dense(group: TensorGroup, transform: LayerTransform) -> Tensor:
    """(N, d_out, d_in)"""
    return group.scale * reconstruct(transform, *by_frequency(group.triplets, transform))


def dense_of_saved(group: TensorGroup) -> Tensor:
    """The same from the coefficients that the group has, whatever it was made from."""
    weights = group.weights.double()
    if group.skew is not None:
        weights = rotation(group.skew.detach().double(), weights)
    count = group.layers
    width = STARTS["dft"](count).width if group.turns is not None else (1,) * len(weights)
    return dense(group, LayerTransform(weights, None if group.turns is None else group.turns.double(), width))


def groups_of(tuned: Tuned, lane: str | None = None) -> dict[str, TensorGroup]:
    return {key: module for attached in tuned.attached(lane) for key, module in attached.attachment.shared.items()
            if isinstance(module, TensorGroup)}


def members(tuned: Tuned) -> dict[str, list[tuple[Site, int]]]:
    """(site, place in the tensor) of every group, in order of place."""
    found: dict[str, list[tuple[Site, int]]] = {}
    for key, group in groups_of(tuned).items():
        for site, delta in tuned.pairs():
            if isinstance(delta, TsvdDelta | TsvdStackDelta) and delta.held[0] is group:
                found.setdefault(key, []).append((site, delta.layer if isinstance(delta, TsvdDelta) else delta.layers[0]))
        found[key].sort(key=lambda pair: pair[1])
    return found


def train(tuned: Tuned, loss: Callable[[], Tensor], total: int, lr: float = 0.01, log: list | None = None,
          each: Callable[[int], None] = lambda step: None) -> list[float]:
    """AdamW with the controllers; the loss of every step."""
    optimizer = torch.optim.AdamW(tuned.delta_parameters().values(), lr=lr, weight_decay=0.0)
    emit = Emitter([log.append] if log is not None else [])
    controllers = tuned.controllers(StepPlan(total, emit, row_keeper(optimizer)))
    losses = []
    with training_mode(tuned, True):
        for step in range(1, total + 1):
            optimizer.zero_grad()
            value = loss()
            (value + tuned.penalty()).backward()
            for controller in controllers:
                controller.after_backward(step)
            optimizer.step()
            for controller in controllers:
                controller.after_step(step)
            losses.append(float(value.detach()))
            each(step)
    for controller in controllers:
        controller.finish()
    tuned.eval()
    return losses


def numbers(tuned: Tuned) -> int:
    return sum(int(group.triplets.numbers().sum()) for group in groups_of(tuned).values())


def deep_bert(layers: int = 3) -> nn.Module:
    """A BERT of that many layers whose attention has four square matrices."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4, num_labels=3,
        pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3)).eval()


def tuned_of(name: str, layers: int = 3, dtype: torch.dtype = torch.float64, shaken: bool = True, **settings: Any) -> Tuned:
    tuned = attach(deep_bert(layers), [TSVD(**{"rank": 2, "transform": name} | settings)])
    if shaken:
        perturb(tuned, size=0.2)
    return tuned.to(dtype)


def loss_of(tuned: Tuned) -> Tensor:
    return tuned(**toy_batch("bert")).loss
