"""Orthonormal rows: deviation, residual, step and penalties against the plain formulas, real and complex, with padding."""

import pytest
import torch

from deltaloom.deltas._orthogonality import deviation, residual, squared_penalty, step_towards, sum_of_penalties
from deltaloom.deltas._triplets import Triplets, orthonormal_rows

each_type = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
SHAPE = (3, 4, 7)  # blocks, rows, width


def blocks(dtype, seed=0, size=0.5, shape=SHAPE):
    return size * torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def orthonormal(dtype, shape=SHAPE):
    return torch.linalg.qr(blocks(dtype, shape=shape).mT).Q.mT.contiguous()


def plain(found, root):
    """||X X^H - I|| of each block as one would write it; or its square."""
    gap = found @ found.mH - torch.eye(found.shape[1], dtype=found.dtype)
    square = (gap * gap.conj()).real.sum((-2, -1))
    return square.sqrt() if root else square


def norm_penalty(found):
    return torch.stack([sum_of_penalties([block], True) for block in found])


PENALTIES = {False: squared_penalty, True: norm_penalty}


@each_type
def test_deviation_and_residual_are_those_of_a_loop(dtype):
    found = blocks(dtype)
    expected = torch.stack([block @ block.conj().T - torch.eye(4, dtype=dtype) for block in found])
    torch.testing.assert_close(deviation(found), expected, rtol=0, atol=1e-14)
    worst = max(float(torch.linalg.matrix_norm(gap)) / 2 for gap in expected)
    assert residual(found) == pytest.approx(worst, rel=1e-12)


@each_type
@pytest.mark.parametrize("root", [False, True], ids=["squared", "norm"])
def test_penalties_and_their_gradients_are_those_of_the_plain_formula(dtype, root):
    one, other = (blocks(dtype).requires_grad_() for _ in range(2))
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    value, expected = PENALTIES[root](one), plain(other, root)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    (value * factors).sum().backward()
    (expected * factors).sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-13)


@each_type
@pytest.mark.parametrize("root", [False, True], ids=["squared", "norm"])
def test_gradcheck(dtype, root):
    assert torch.autograd.gradcheck(PENALTIES[root], (blocks(dtype, shape=(2, 2, 3)).requires_grad_(),))


@pytest.mark.parametrize("root", [False, True], ids=["squared", "norm"])
def test_a_sum_over_matrices_of_any_sizes_is_that_of_a_loop(root):
    shapes = [(2, 5), (3, 5), (2, 5), (1, 4), (2, 5)]
    matrices = [blocks(torch.float64, seed, shape=shape).requires_grad_() for seed, shape in enumerate(shapes)]
    expected = sum(plain(matrix[None], root).sum() for matrix in matrices)
    total = sum_of_penalties(matrices, root)
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=0)
    own, other = (torch.autograd.grad(3 * value, matrices) for value in (total, expected))
    for one, two in zip(own, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)


@each_type
@pytest.mark.parametrize("root", [False, True], ids=["squared", "norm"])
def test_orthonormal_rows_cost_nothing_and_feel_nothing(dtype, root):
    found = orthonormal(dtype).requires_grad_()
    value = PENALTIES[root](found)
    value.sum().backward()
    assert value.abs().max() < 1e-13 and residual(found.detach()) < 1e-14
    # the norm's gradient has length 2 however small the deviation is: what rounding leaves is all that can be asked for
    assert found.grad.isfinite().all() and (root or found.grad.abs().max() < 1e-13)
    unit = torch.eye(4, 7, dtype=dtype).repeat(3, 1, 1).requires_grad_()  # exactly zero: so is the gradient
    PENALTIES[root](unit).sum().backward()
    assert not unit.grad.abs().any()
    torch.testing.assert_close(step_towards(found.detach(), 0.3), found.detach(), rtol=0, atol=1e-14)


@each_type
def test_no_graph_is_kept(dtype):
    """The gradient is formed at once: no saved tensors, no graph behind the value but one node."""
    saved = []
    found = blocks(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        value = squared_penalty(found)
    assert saved == []
    assert [type(fn).__name__ for fn, _ in value.grad_fn.next_functions if fn is not None] == ["AccumulateGrad"]
    (gradient,) = torch.autograd.grad(value.sum(), found, create_graph=True)
    assert not gradient.requires_grad


@each_type
@pytest.mark.parametrize("strength", [0.05, 0.25, 0.5])
def test_a_step_lowers_the_residual(dtype, strength):
    found = orthonormal(dtype) + blocks(dtype, 1, 0.05)
    after = step_towards(found, strength)
    torch.testing.assert_close(after, found - strength * (found @ found.mH - torch.eye(4, dtype=dtype)) @ found)
    assert all(float(a) < float(b) for a, b in zip(plain(after, True), plain(found, True), strict=True))


@each_type
def test_half_steps_lead_to_the_polar_factor(dtype):
    found = orthonormal(dtype) + blocks(dtype, 1, 0.1)
    left, _, right = torch.linalg.svd(found, full_matrices=False)
    for _ in range(12):
        found = step_towards(found, 0.5)
    torch.testing.assert_close(found, left @ right, rtol=0, atol=1e-13)


@each_type
def test_padding_counts_as_absent(dtype):
    valid = torch.tensor([[True] * 4, [True, True, True, False], [True, False, False, False]])
    padded = blocks(dtype) * valid[..., None]
    gaps, stepped = deviation(padded, valid), step_towards(padded, 0.3, valid)
    worst = 0.0
    for index, row in enumerate(valid):
        block = padded[index, row][None]
        torch.testing.assert_close(gaps[index][row][:, row], deviation(block)[0])
        assert not gaps[index][~row].abs().any() and not gaps[index][:, ~row].abs().any()
        torch.testing.assert_close(stepped[index, row], step_towards(block, 0.3)[0])
        assert not stepped[index, ~row].abs().any()
        worst = max(worst, residual(block))
    assert residual(padded, valid) == pytest.approx(worst, rel=1e-12)


def test_nothing_is_orthonormal():
    assert residual(torch.zeros(0, 0, 5)) == 0.0 == residual(torch.zeros(2, 0, 5))
    assert residual(torch.zeros(1, 3, 5), torch.zeros(1, 3, dtype=torch.bool)) == 0.0


# ---- blocks of unequal size, some of complex rows, as triplets hold them ---------------------------------------------

def triplets(seed=0):
    """Components 0 and 3 are complex (two rows), of blocks 1 and 2; the others real, of blocks 0, 0, 2 and 3."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.tensor([0, 0, 1, 2, 3, 3, 4, 5])
    up, down = (torch.randn(8, width, dtype=torch.float64, generator=generator) * 0.4 for width in (5, 6))
    return Triplets(up, down, torch.tensor([1, 0, 0, 2, 2, 3]), owner)


def by_hand(matrix):
    """The blocks of `triplets`, each alone."""
    pair = torch.complex
    return [matrix[[2, 3]], matrix[[6]], matrix[[7]], pair(matrix[[0]], matrix[[1]]), pair(matrix[[4]], matrix[[5]])]


@pytest.mark.parametrize("root", [False, True], ids=["squared", "norm"])
def test_triplets_sum_over_their_blocks_complex_ones_twice(root):
    one, other = triplets(), triplets()
    value = one.penalty(PENALTIES[root])
    expected = sum((2 if block.is_complex() else 1) * plain(block[None], root).sum()
                   for matrix in (other.up, other.down) for block in by_hand(matrix))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    value.backward()
    expected.backward()
    for a, b in ((one.up, other.up), (one.down, other.down)):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-13)
    assert one.residual() == pytest.approx(max(residual(block[None]) for matrix in (one.up.detach(), one.down.detach())
                                               for block in by_hand(matrix)), rel=1e-12)


def test_triplets_step_each_block_by_itself():
    one, before = triplets(), triplets()
    one.orthonormalise(0.3)
    for own, old in ((one.up, before.up), (one.down, before.down)):
        for block, expected in zip(by_hand(own.detach()), by_hand(old.detach()), strict=True):
            torch.testing.assert_close(block, step_towards(expected[None], 0.3)[0])


def test_triplets_without_some_are_those_of_the_rest():
    from deltaloom.deltas.base import keep_rows

    one, before = triplets(), triplets()
    one.keep(torch.tensor([0, 2, 5]), keep_rows)
    rows = [0, 1, 3, 7]
    assert one.owner.tolist() == [0, 0, 1, 2] and one.block.tolist() == [1, 0, 3]
    assert torch.equal(one.up, before.up[rows]) and torch.equal(one.down, before.down[rows])
    assert one.numbers().tolist() == [2 * 11 + 1, 12, 12]
    for own, old in ((one.up, before.up), (one.down, before.down)):
        blocks_now = [own[[2]], own[[3]], torch.complex(own[[0]], own[[1]])]
        blocks_then = [old[[3]], old[[7]], torch.complex(old[[0]], old[[1]])]
        assert all(torch.equal(a, b) for a, b in zip(blocks_now, blocks_then, strict=True))
    one.orthonormalise(0.3)
    torch.testing.assert_close(one.up[[3]], step_towards(before.up.detach()[[7]][None], 0.3)[0])


@pytest.mark.parametrize("paired", [False, True])
def test_random_orthonormal_rows(paired):
    rows = orthonormal_rows(4, 9, torch.Generator().manual_seed(1), paired=paired)
    found = torch.complex(rows[0::2], rows[1::2]) if paired else rows
    assert rows.shape == (8 if paired else 4, 9) and residual(found[None]) < 1e-6
    assert torch.equal(rows, orthonormal_rows(4, 9, torch.Generator().manual_seed(1), paired=paired))
