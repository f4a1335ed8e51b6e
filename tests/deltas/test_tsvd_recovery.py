"""What each transform is good for: planted increments of a stack are recovered under one budget, seeds fixed."""

import pytest
import torch
from torch import Tensor, nn

from deltaloom.deltas.tsvd import TSVD
from deltaloom.tuned import attach
from tests.deltas.tensor_oracles import numbers, train

LAYERS, WIDTH, RANK = 6, 16, 2


class Parallel(nn.Module):
    """Layers beside one another: the loss is the distance of all increments from planted ones, seen through inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        for layer in self.layers:
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers])


def planted(kind: str) -> Tensor:
    """(N, d, d): independent of one another, or smooth in depth (quadratic in the layer's place)."""
    generator = torch.Generator().manual_seed(3)

    def low_rank(rank: int) -> Tensor:
        u, v = (torch.randn(WIDTH, rank, generator=generator) for _ in range(2))
        return u @ v.T / WIDTH ** 0.5
    if kind == "independent":
        return torch.stack([low_rank(4) for _ in range(LAYERS)])
    places = torch.linspace(-1, 1, LAYERS)[:, None, None]
    return low_rank(4) + places * low_rank(2) + places ** 2 * low_rank(2)


def error(kind: str, transform: str) -> float:
    """Relative distance of what was learned from what was planted; every transform ends with the same number of parameters."""
    target = planted(kind)
    tuned = attach(Parallel(), [TSVD(rank=RANK, reserve=2, transform=transform, rule="budget", targets="all", start=0.2, end=0.4,
                                     scale=0.5)])
    x = torch.eye(WIDTH)
    train(tuned, lambda: (tuned(x) - target.mT).square().sum() / LAYERS, 200, lr=0.03)
    assert numbers(tuned) == LAYERS * RANK * (2 * WIDTH + 1)
    with torch.no_grad():
        return float((tuned(x) - target.mT).norm() / target.norm())


@pytest.fixture(scope="module")
def errors():
    return {(kind, name): error(kind, name) for kind in ("independent", "smooth") for name in ("identity", "dct", "frame")}


def test_a_smooth_stack_is_for_the_cosine_transform(errors):
    assert errors["smooth", "dct"] < 0.45 * errors["smooth", "identity"]


def test_independent_layers_are_for_the_identity(errors):
    assert errors["independent", "identity"] < 0.8 * errors["independent", "dct"]


def test_the_frame_is_good_at_both(errors):
    assert errors["independent", "frame"] < 0.9 * errors["independent", "dct"]
    assert errors["smooth", "frame"] < 0.65 * errors["smooth", "identity"]
