"""Orthonormal factors of the t-SVD delta: the penalty by the t-product, and the decoupled step."""


import pytest
import torch

from deltaloom.linalg import t_identity, t_product, t_transpose
from tests.contract.cases import gradients
from tests.deltas.tensor_oracles import TRANSFORMS, by_frequency, groups_of, loss_of, train, transform_of, tuned_of

each_transform = pytest.mark.parametrize("name", TRANSFORMS)


def spatial(matrices, layers, pairs):
    """The tensor (N, d, r) whose slices of the unnormalised spectrum are these matrices."""
    half = []
    for matrix, pair in zip(matrices, pairs, strict=True):
        half.append(torch.complex(*matrix.chunk(2, 1)) if pair else matrix + 0j)
    return torch.fft.irfft(torch.stack(half), n=layers, dim=0)


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 8])
def test_the_penalty_of_the_dft_is_the_one_of_the_t_product(layers):
    """coefficient / 2 * (||U^T * U - I||^2 + ||V^T * V - I||^2) of the spatial tensors, where there is one group."""
    tuned = tuned_of("dft", layers, preset="literal", targets="q", orthogonality=0.7)
    group, = groups_of(tuned).values()
    transform = transform_of("dft", layers)
    us, _, vs = by_frequency(group.triplets, transform)
    total = 0.0
    for matrices in (us, vs):
        tensor = spatial(matrices, layers, [width == 2 for width in transform.width])
        gap = t_product(t_transpose(tensor), tensor) - t_identity(tensor.shape[2], layers)
        total += float(gap.square().sum())
    assert float(tuned.penalty().detach()) == pytest.approx(0.7 / 2 * total, rel=1e-10)


@each_transform
def test_the_penalty_has_the_gradient_of_its_formula_and_weighs_matrices_alike(name):
    tuned = tuned_of(name, penalty="loss", orthogonality=0.7, targets=("q", "up"))
    tuned.penalty().backward()
    found = gradients(tuned)
    tuned.zero_grad()
    total = 0.0
    for group in groups_of(tuned).values():
        for matrix in (group.triplets.up, group.triplets.down):
            for block in range(int(group.triplets.block.max()) + 1):
                rows = matrix[group.triplets.block[group.triplets.owner] == block]
                pair = len(rows) == 2 * int((group.triplets.block == block).sum())
                rows = torch.complex(rows[::2], rows[1::2]) if pair else rows
                gap = rows @ rows.mH - torch.eye(len(rows))
                total = total + (2 if pair else 1) * gap.abs().square().sum()
    value = 0.7 * total / (2 * 6)
    assert float(tuned.penalty().detach()) == pytest.approx(float(value.detach()), rel=1e-12)
    value.backward()
    for key, gradient in gradients(tuned).items():
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-12)


@each_transform
def test_decoupled_steps_leave_loss_and_gradients_alone_and_restore_orthonormality(name):
    results = []
    for strength in (0.0, 0.3):
        tuned = tuned_of(name, orthogonality=strength, rule="fixed")
        assert float(tuned.penalty().detach()) == 0 and not tuned.penalty().requires_grad
        before = tuned.pairs()[0][1].orthogonality()
        seen = []
        train(tuned, lambda tuned=tuned: loss_of(tuned), 1, each=lambda _, tuned=tuned, seen=seen: seen.append(gradients(tuned)))
        results.append(seen[0])
        after = tuned.pairs()[0][1].orthogonality()
        assert after < 0.9 * before if strength else after == pytest.approx(before, rel=0.2)
        assert all(len(group.triplets.core) == 2 * group.weights.shape[0] for group in groups_of(tuned).values())
    assert results[0].keys() == results[1].keys() and all(torch.equal(results[0][key], results[1][key]) for key in results[0])
