"""Laws of low-rank approximation, against dense float64 SVDs."""

import pytest
import torch

from deltaloom.errors import NonFiniteError
from deltaloom.linalg import matrix

SHAPES = [(5, 9), (9, 5), (6, 6), (1, 4), (4, 1)]


def case(shape, seed=0, samples=40):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    inputs = torch.randn(samples, shape[1], generator=generator, dtype=torch.float64) * torch.logspace(0, -2, shape[1]).double()
    return weight, inputs


@pytest.mark.parametrize("shape", SHAPES)
def test_without_inputs_it_is_the_truncated_svd(shape):
    weight, _ = case(shape)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    energies, directions = matrix.output_directions(weight)
    torch.testing.assert_close(energies, s.square())
    torch.testing.assert_close(directions.T @ directions, torch.eye(len(s), dtype=torch.float64))
    for rank in range(min(shape) + 1):
        left, right = matrix.best_of_rank(weight, rank)
        assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
        torch.testing.assert_close(left @ right, (u[:, :rank] * s[:rank]) @ vh[:rank])


@pytest.mark.parametrize("shape", SHAPES)
def test_with_inputs_the_outputs_error_is_the_least_of_that_rank(shape):
    weight, inputs = case(shape)
    gram = inputs.T @ inputs
    outputs = inputs @ weight.T
    u, s, vh = torch.linalg.svd(outputs, full_matrices=False)  # Eckart and Young on the outputs themselves
    energies, _ = matrix.output_directions(weight, gram)
    torch.testing.assert_close(energies, s[:len(energies)].square())
    for rank in range(1, min(shape)):
        left, right = matrix.best_of_rank(weight, rank, gram)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close(inputs @ (left @ right).T, best)
        error = matrix.output_error(weight - left @ right, gram)
        assert error == pytest.approx(float((outputs - inputs @ (left @ right).T).square().sum()), rel=1e-9)
        assert error == pytest.approx(float(energies[rank:].sum()), rel=1e-6)


def test_with_inputs_it_is_the_whitened_svd_by_a_cholesky_factor():
    weight, inputs = case((7, 9))
    lower = torch.linalg.cholesky(inputs.T @ inputs)
    u, s, vh = torch.linalg.svd(weight @ lower, full_matrices=False)
    textbook = (u[:, :3] * s[:3]) @ vh[:3] @ torch.linalg.inv(lower)
    left, right = matrix.best_of_rank(weight, 3, inputs.T @ inputs)
    torch.testing.assert_close(left @ right, textbook)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_a_singular_gram_matrix_is_no_special_case(shape):
    weight, inputs = case(shape, samples=2)
    left, right = matrix.best_of_rank(weight, 2, inputs.T @ inputs)
    torch.testing.assert_close(inputs @ (left @ right).T, inputs @ weight.T)
    assert matrix.best_of_rank(weight, 4, torch.zeros(shape[1], shape[1]))[0].isfinite().all()


def test_the_svd_of_a_product_is_that_of_the_dense_one():
    generator = torch.Generator().manual_seed(3)
    for d_out, rank, d_in in [(8, 3, 6), (4, 7, 5), (6, 1, 6)]:
        left = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
        right = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
        u, s, v = matrix.product_directions(left, right)
        torch.testing.assert_close(s, torch.linalg.svdvals(left @ right)[:len(s)])
        torch.testing.assert_close((u * s) @ v.T, left @ right)
        torch.testing.assert_close(u.T @ u, torch.eye(len(s), dtype=torch.float64))


def test_a_ridge_is_a_share_of_the_mean_of_the_diagonal():
    gram = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(matrix.ridged(gram, 0.5), torch.diag(torch.tensor([2.0, 4.0], dtype=torch.float64)))


def test_wrong_shapes_and_numbers_are_refused():
    weight = torch.ones(3, 4)
    with pytest.raises(ValueError, match="rank"):
        matrix.best_of_rank(weight, 4)
    with pytest.raises(ValueError, match="Gram"):
        matrix.output_directions(weight, torch.eye(3))
    with pytest.raises(ValueError, match="factors"):
        matrix.product_directions(weight, weight)
    with pytest.raises(NonFiniteError):
        matrix.output_directions(weight * float("nan"))
    with pytest.raises(NonFiniteError):
        matrix.output_error(weight, torch.eye(4) * float("inf"))
