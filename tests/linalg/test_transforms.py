"""Transforms over the layers: orthonormal, as defined, exact where they vanish, and one reconstruction for all."""

from __future__ import annotations

import math

import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaloom.errors import NonFiniteError
from deltaloom.linalg import LayerTransform, m_svd, reconstruct, rotation, transforms

COUNTS = [1, 2, 3, 5, 8, 12, 28, 30, 32]
REAL = {"identity": transforms.identity, "dct": transforms.dct, "haar": transforms.haar}
TIGHT = {"atol": 1e-12, "rtol": 1e-12}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_factors(transform: LayerTransform, d1: int, d2: int, ranks: list[int]) -> tuple[list[Tensor], ...]:
    us = [random(d1, width * rank, seed=3 * f) for f, (width, rank) in enumerate(zip(transform.width, ranks, strict=True))]
    ss = [random(rank, seed=3 * f + 1) for f, rank in enumerate(ranks)]
    vs = [random(d2, width * rank, seed=3 * f + 2) for f, (width, rank) in enumerate(zip(transform.width, ranks, strict=True))]
    return us, ss, vs


def real_basis(transform: LayerTransform) -> Tensor:
    """The rows over layers of the real coefficients: one of a component of width 1, weights and turns of width 2."""
    rows = []
    for f, width in enumerate(transform.width):
        rows += [transform.weights[f]] if width == 1 else [transform.weights[f], transform.turns[f]]
    return torch.stack(rows)


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("name", [*REAL, "data", "dft"])
def test_rows_are_orthonormal(name, n):
    gram = random(n, 2 * n) @ random(n, 2 * n).T
    made = transforms.dft(n) if name == "dft" else transforms.data(gram) if name == "data" else REAL[name](n)
    basis = real_basis(made)
    assert basis.dtype == torch.float64 and made.layers == n and sum(made.width) == n
    torch.testing.assert_close(basis @ basis.T, torch.eye(n, dtype=torch.float64), **TIGHT)
    assert (made.turns is None) == (2 not in made.width)


@pytest.mark.parametrize("n", COUNTS)
def test_the_dct_is_that_of_scipy_and_vanishes_exactly(n):
    weights = transforms.dct(n).weights
    expected = torch.from_numpy(scipy.fft.dct(torch.eye(n, dtype=torch.float64).numpy(), norm="ortho", axis=0))
    torch.testing.assert_close(weights, expected, **TIGHT)
    assert ((weights.abs() < 1e-12) == (weights == 0)).all()


def test_frequency_4_of_12_does_not_reach_four_layers():
    weights = transforms.dct(12).weights
    assert (weights[4] == 0).nonzero().flatten().tolist() == [1, 4, 7, 10]


@pytest.mark.parametrize("n", [*COUNTS, 7, 22, 24, 33])
def test_haar_reaches_a_layer_with_few_components_from_coarse_to_fine(n):
    weights = transforms.haar(n).weights
    reach = (weights != 0).sum(0)
    assert reach.max() <= 1 + math.ceil(math.log2(n))
    spans = (weights != 0).sum(1)
    assert spans[0] == n and (spans[1:].diff() <= 1).all()
    torch.testing.assert_close(weights[1:].sum(1), torch.zeros(n - 1, dtype=torch.float64), **TIGHT)


def test_haar_of_three_layers():
    squares = torch.tensor([[2, 2, 2], [1, 1, -4], [3, -3, 0]], dtype=torch.float64) / 6
    torch.testing.assert_close(transforms.haar(3).weights, squares.sign() * squares.abs().sqrt(), **TIGHT)


def test_the_order_of_haar_is_by_level_then_by_depth():
    spans = [row.nonzero().flatten().tolist() for row in transforms.haar(8).weights]
    assert spans == [[*range(8)], [*range(8)], [0, 1, 2, 3], [4, 5, 6, 7], [0, 1], [2, 3], [4, 5], [6, 7]]


def test_for_two_layers_dft_dct_and_haar_are_one_and_for_one_layer_all():
    expected = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    for make in (transforms.dft, transforms.dct, transforms.haar):
        made = make(2)
        assert made.turns is None and made.width == (1, 1)
        signs = (made.weights * expected).sum(1, keepdim=True).sign()
        torch.testing.assert_close(made.weights * signs, expected, atol=1e-15, rtol=0)
        single = make(1)
        assert single.weights.tolist() == [[1.0]] and single.turns is None and single.width == (1,)


@pytest.mark.parametrize("n", COUNTS)
def test_widths_and_the_definition_of_the_dft(n):
    made = transforms.dft(n)
    assert made.components == n // 2 + 1
    for f, width in enumerate(made.width):
        assert width == (1 if f in (0, n / 2) else 2)
        for layer in range(n):
            phase = 2 * math.pi * f * layer / n
            assert made.weights[f, layer] == pytest.approx(math.sqrt(width / n) * math.cos(phase), abs=1e-12)
            if made.turns is not None:
                turn = math.sqrt(2 / n) * math.sin(phase) if width == 2 else 0.0
                assert made.turns[f, layer] == pytest.approx(turn, abs=1e-12)
                assert (made.turns[f, layer] == 0) == (abs(turn) < 1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.data())
def test_the_dft_is_that_of_irfft_and_of_the_complex_formula(n, d1, d2, drawn):
    made = transforms.dft(n)
    ranks = drawn.draw(st.lists(st.integers(0, 3), min_size=made.components, max_size=made.components))
    us, ss, vs = random_factors(made, d1, d2, ranks)
    formula, spectrum = torch.zeros(n, d1, d2, dtype=torch.float64), []
    for f, width in enumerate(made.width):
        u, v = (torch.complex(*x.chunk(2, dim=1)) if width == 2 else x + 0j for x in (us[f], vs[f]))
        component = (u * ss[f]) @ v.mH
        spectrum.append(component / math.sqrt(width))
        phases = torch.exp(2j * math.pi * f * torch.arange(n, dtype=torch.float64) / n)
        formula += math.sqrt(width / n) * (phases[:, None, None] * component).real
    dense = reconstruct(made, us, ss, vs)
    torch.testing.assert_close(dense, formula, **TIGHT)
    torch.testing.assert_close(dense, torch.fft.irfft(torch.stack(spectrum), n=n, dim=0, norm="ortho"), **TIGHT)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.sampled_from([*REAL, "frame"]), st.data())
def test_the_reconstruction_of_real_transforms_is_a_loop(n, name, drawn):
    made = transforms.frame(n) if name == "frame" else REAL[name](n)
    ranks = drawn.draw(st.lists(st.integers(0, 3), min_size=made.components, max_size=made.components))
    us, ss, vs = random_factors(made, 3, 4, ranks)
    expected = torch.zeros(n, 3, 4, dtype=torch.float64)
    for f, rank in enumerate(ranks):
        for layer in range(n):
            for i in range(rank):
                expected[layer] += made.weights[f, layer] * ss[f][i] * torch.outer(us[f][:, i], vs[f][:, i])
    torch.testing.assert_close(reconstruct(made, us, ss, vs), expected, **TIGHT)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("name", [*REAL, "dft", "frame"])
def test_a_component_of_unit_factors_has_unit_energy(name, n):
    made = getattr(transforms, name)(n)
    for f in range(made.components):
        us, ss, vs = random_factors(made, 3, 4, [int(g == f) for g in range(made.components)])
        us[f], vs[f], ss[f] = us[f] / us[f].norm(), vs[f] / vs[f].norm(), torch.ones(1)
        assert float(reconstruct(made, us, ss, vs).square().sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("name", list(REAL))
def test_the_svd_by_a_transform_is_its_reconstruction(name, n):
    a, made = random(n, 3, 4), REAL[name](n)
    u, s, v = m_svd(a, made.weights)
    torch.testing.assert_close(reconstruct(made, list(u), list(s), list(v)), a, **TIGHT)
    torch.testing.assert_close(s.square().sum(), a.square().sum(), **TIGHT)                     # Parseval


def test_the_frame_has_each_layer_and_what_they_share():
    made = transforms.frame(4)
    assert made.components == 5 and ((made.weights != 0).sum(0) == 2).all()
    assert torch.equal(made.weights[:4], torch.eye(4, dtype=torch.float64)) and made.weights[4].tolist() == [0.5] * 4


@pytest.mark.parametrize("n", [1, 2, 6])
def test_the_rows_of_data_diagonalise_the_gram_matrix_largest_first(n):
    gram = random(n, 3) @ random(n, 3).T + 0.1 * random(n, n, seed=1) @ random(n, n, seed=1).T
    weights = transforms.data(gram).weights
    energies = weights @ gram @ weights.T
    torch.testing.assert_close(energies.diagonal(), torch.linalg.eigvalsh(gram).flip(0), **TIGHT)
    torch.testing.assert_close(energies, torch.diag(energies.diagonal()), **TIGHT)
    assert (weights.gather(1, weights.abs().argmax(1, keepdim=True)) > 0).all()


def test_signs_of_data_do_not_hang_on_rounding():
    weights = transforms.data(torch.tensor([[2.0, -1.0], [-1.0, 2.0]])).weights
    torch.testing.assert_close(weights, torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / math.sqrt(2), **TIGHT)
    root = torch.tensor([-1.0, 1.0, -1.0, 1.0 + 1e-13], dtype=torch.float64)
    assert transforms.data(torch.outer(root, root)).weights[0].sign().tolist() == [1.0, -1.0, 1.0, -1.0]


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_a_rotation_is_orthonormal_and_starts_at_its_start(n):
    start = transforms.haar(n).weights
    zero = torch.zeros(n * (n - 1) // 2)
    assert torch.equal(rotation(zero, start), start)
    turned = rotation(3 * random(n * (n - 1) // 2), start)
    torch.testing.assert_close(turned @ turned.T, torch.eye(n, dtype=torch.float64), **TIGHT)
    assert n == 1 or (turned - start).abs().max() > 0.1
    assert rotation(zero, start.float()).dtype == torch.float32


def test_a_rotation_of_two_layers_is_an_angle_and_differentiable():
    angle = torch.tensor([0.3], dtype=torch.float64)
    expected = torch.tensor([[math.cos(0.3), math.sin(0.3)], [-math.sin(0.3), math.cos(0.3)]], dtype=torch.float64)
    torch.testing.assert_close(rotation(angle, torch.eye(2, dtype=torch.float64)), expected, **TIGHT)
    start = transforms.dct(4).weights
    for values in (torch.zeros(6, dtype=torch.float64), random(6)):
        assert torch.autograd.gradcheck(rotation, (values.requires_grad_(), start.clone().requires_grad_()))
    upper = torch.zeros(6, requires_grad=True)                         # a float32 parameter, float64 result
    rotation(upper, start).square().mul(start).sum().backward()
    assert upper.grad is not None and upper.grad.dtype == torch.float32 and upper.grad.abs().max() > 0


def test_a_learned_transform_passes_gradients_through_the_reconstruction():
    upper = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    made = LayerTransform(rotation(upper, transforms.dct(3).weights), None, (1, 1, 1))
    reconstruct(made, *random_factors(made, 2, 2, [1, 1, 1]))[0].sum().backward()
    assert upper.grad is not None and upper.grad.abs().min() > 0


@pytest.mark.parametrize("n", [0, -1])
@pytest.mark.parametrize("name", [*REAL, "dft", "frame"])
def test_no_layers_is_an_error(name, n):
    with pytest.raises(ValueError, match=f"1 or more layers, got {n}"):
        getattr(transforms, name)(n)


@pytest.mark.parametrize(("call", "words"), [
    (lambda: transforms.data(torch.zeros(2, 3)), "square"),
    (lambda: transforms.data(torch.zeros(0, 0)), "square"),
    (lambda: rotation(torch.zeros(2), torch.eye(3)), r"\(2,\) and \(3, 3\)"),
    (lambda: rotation(torch.zeros(3), torch.eye(3)[:2]), r"\(3,\) and \(2, 3\)"),
    (lambda: LayerTransform(torch.eye(2), None, (1,)), "F widths"),
    (lambda: LayerTransform(torch.eye(2), None, (1, 3)), "F widths"),
    (lambda: LayerTransform(torch.eye(2), None, (1, 2)), "turns"),
    (lambda: LayerTransform(torch.eye(2), torch.eye(2), (1, 1)), "turns"),
    (lambda: LayerTransform(torch.eye(2), torch.eye(3), (1, 2)), r"got \(3, 3\)"),
    (lambda: reconstruct(transforms.dct(2), [random(2, 1)], [random(1)], [random(2, 1)]), "2 components, got 1"),
])
def test_what_does_not_fit_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_gram_matrix_with_nan_is_named():
    with pytest.raises(NonFiniteError, match="4 of 4 entries"):
        transforms.data(torch.full((2, 2), torch.nan))
