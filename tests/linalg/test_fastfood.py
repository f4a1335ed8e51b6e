"""The Walsh-Hadamard transform and Fastfood against dense matrices; draws against numbers that may never change."""

from __future__ import annotations

import hashlib
from functools import reduce

import numpy as np
import pytest
import torch

from deltaloom.linalg.draws import Draws
from deltaloom.linalg.fastfood import Fastfood, walsh_hadamard

TWO = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


def hadamard(size: int) -> torch.Tensor:
    return reduce(torch.kron, [TWO] * (size.bit_length() - 1), torch.ones(1, 1, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("lead", [(), (3,), (2, 0), (2, 3)], ids=str)
def test_the_transform_is_the_dense_product(size: int, lead: tuple[int, ...]) -> None:
    x = torch.randn(*lead, size, dtype=torch.float64, requires_grad=True)
    y = walsh_hadamard(x)
    torch.testing.assert_close(y, x @ hadamard(size), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(walsh_hadamard(y), size * x, rtol=1e-12, atol=1e-12)


def test_its_gradient_and_second_gradient_are_right() -> None:
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(walsh_hadamard, [x])
    assert torch.autograd.gradgradcheck(walsh_hadamard, [x])
    with pytest.raises(ValueError, match="power of two"):
        walsh_hadamard(torch.zeros(3))


def dense(p: Fastfood) -> torch.Tensor:
    """P from its parts, in float64."""
    h = hadamard(p.block)
    blocks = []
    for signs, order, normals in zip(p.signs.double(), p.order, p.normals.double(), strict=True):
        blocks.append(h @ torch.diag(normals) @ torch.eye(p.block, dtype=torch.float64)[order] @ h @ torch.diag(signs))
    return torch.cat(blocks)[:p.rows, :p.columns]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (300, 1), (256, 256), (700, 20), (1000, 300)])
def test_the_projection_is_the_dense_product_and_its_transpose(rows: int, columns: int) -> None:
    p = Fastfood(rows, columns, seed=3)
    matrix, z, g = dense(p), torch.randn(columns), torch.randn(rows)
    torch.testing.assert_close(p(z).double(), matrix @ z.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(p.transposed(g).double(), matrix.T @ g.double(), rtol=1e-4, atol=1e-5)


def test_columns_are_nearly_orthonormal() -> None:
    matrix = dense(Fastfood(4000, 100, seed=0))
    gram = matrix.T @ matrix
    torch.testing.assert_close(gram.diagonal().mean().item(), 1.0, rtol=0.02, atol=0)
    assert (gram.diagonal() - 1).abs().max() < 0.15
    assert (gram - torch.diag(gram.diagonal())).square().mean().sqrt() < 0.03
    other = dense(Fastfood(4000, 100, seed=1))
    assert (matrix.T @ other).square().mean().sqrt() < 0.03


def test_draws_are_philox_and_whole_numbers() -> None:
    draws = Draws(5, 9)
    raw = np.random.Philox(key=np.array([5, 9], dtype=np.uint64)).random_raw(60)
    pieces = [(int(word) >> shift) & 0xFFFF for word in raw for shift in (0, 16, 32, 48)]
    expected = [(sum(pieces[12 * i:12 * i + 12]) - 6 * 65535) / 65536 for i in range(20)]
    assert draws.normals(20).tolist() == expected


def test_draws_never_change() -> None:
    """These bits are what saved deltas stand on: if this fails, they cannot be read any more."""
    digest = hashlib.sha256()
    for tensor in (Draws(1).signs(1000), Draws(1, 1).permutations(3, 50), Draws(1, 2).normals(1000), Draws(1, 3).uniforms(1000),
                   Draws(1, 4).integers(1000, 77), Fastfood(3000, 300, 7)(Draws(2).normals(300).float())):
        digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest() == "6d57fab7415c7f7fd669a425fd843dab895ebb1db0486d6d6729a83eeca8899b"


def test_draws_have_the_moments_that_they_say() -> None:
    normals = Draws(0, 2).normals(1 << 16)
    assert abs(normals.mean()) < 0.02 and abs(normals.std() - 1) < 0.02 and normals.abs().max() <= 6
    uniforms = Draws(0, 3).uniforms(1 << 16)
    assert uniforms.min() >= 0 and uniforms.max() < 1 and abs(uniforms.mean() - 0.5) < 0.01
    assert torch.equal(uniforms, uniforms.float().double())
    assert Draws(0).permutations(2, 9).sort(1).values.tolist() == [list(range(9))] * 2
    assert abs(Draws(0).signs(1 << 14).float().mean()) < 0.05
