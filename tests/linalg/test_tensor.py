"""The tensor algebra against block-circulant matrices, loops over slices, and a port of Lu's toolbox in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltaloom.errors import NonFiniteError
from deltaloom.linalg import (
    average_rank,
    block_circulant,
    depth_correlation,
    low_rank_gram,
    m_product,
    m_svd,
    multi_rank,
    t_identity,
    t_product,
    t_svd,
    t_transpose,
    transform,
    transforms,
    tubal_rank,
)

COUNTS = [1, 2, 3, 4, 5, 8, 12]
TIGHT = {"atol": 1e-12, "rtol": 1e-12}
SIZES = st.integers(1, 5)
SHAPES = st.tuples(st.integers(1, 9), SIZES, SIZES)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def orthonormal(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random(n, n, seed=seed)).Q


def of_multi_rank(ranks: list[int], d1: int, d2: int) -> Tensor:
    """A real tensor whose spectrum's slices have these ranks (half of it given), singular values 1, 2, ..."""
    count = 2 * len(ranks) - 1
    slices = []
    for k, rank in enumerate(ranks):
        u, v = (torch.linalg.qr(random(d, rank, seed=k) + (1j * random(d, rank, seed=9 + k) if k else 0j)).Q for d in (d1, d2))
        slices.append(u * torch.arange(1.0, rank + 1) @ v.mH)
    return torch.fft.irfft(torch.stack(slices), n=count, dim=0)


# A port of the functions tsvd (skinny) and tubalrank of Lu's toolbox: slices last, 1-based loops turned to 0-based ones.

def spacing(x: float) -> float:
    return float(np.spacing(x))


def toolbox_tsvd(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n1, n2, n3 = x.shape
    spectrum = np.fft.fft(x, axis=2)
    least = min(n1, n2)
    u, s, v = np.zeros((n1, least, n3), complex), np.zeros((least, least, n3)), np.zeros((n2, least, n3), complex)
    half = (n3 + 2) // 2
    for i in range(half):
        left, values, right = np.linalg.svd(spectrum[:, :, i], full_matrices=False)
        u[:, :, i], s[:, :, i], v[:, :, i] = left, np.diag(values), right.conj().T
    for i in range(half, n3):
        u[:, :, i], s[:, :, i], v[:, :, i] = u[:, :, n3 - i].conj(), s[:, :, n3 - i], v[:, :, n3 - i].conj()
    sums = np.diag(s.sum(2)) / n3 ** 2
    keep = int((sums > max(n1, n2) * spacing(sums.max())).sum())
    back = [np.fft.ifft(part, axis=2) for part in (u[:, :keep], s[:keep, :keep], v[:, :keep])]
    return back[0], back[1], back[2]


def toolbox_tubal_rank(x: np.ndarray) -> int:
    n1, n2, n3 = x.shape
    spectrum = np.fft.fft(x, axis=2)
    sums = sum(np.linalg.svd(spectrum[:, :, k], compute_uv=False) for k in range(n3)) / n3 ** 2
    return int((sums > max(n1, n2) * spacing(sums.max())).sum())


@settings(max_examples=60, deadline=None)
@given(SHAPES, SIZES)
def test_the_product_is_that_of_the_block_circulant_matrix(shape, columns):
    count, d1, p = shape
    a, b = random(*shape), random(count, p, columns, seed=1)
    expected = (block_circulant(a) @ b.reshape(count * p, columns)).reshape(count, d1, columns)
    torch.testing.assert_close(t_product(a, b), expected, **TIGHT)
    loop = torch.stack([sum(a[(i - j) % count] @ b[j] for j in range(count)) for i in range(count)])
    torch.testing.assert_close(t_product(a, b), loop, **TIGHT)


@pytest.mark.parametrize("count", COUNTS)
def test_the_laws_of_the_algebra(count):
    a, b, c = random(count, 3, 4), random(count, 4, 2, seed=1), random(count, 2, 5, seed=2)
    torch.testing.assert_close(t_transpose(t_product(a, b)), t_product(t_transpose(b), t_transpose(a)), **TIGHT)
    torch.testing.assert_close(t_product(a, t_identity(4, count)), a, **TIGHT)
    torch.testing.assert_close(t_product(t_identity(3, count), a), a, **TIGHT)
    torch.testing.assert_close(t_product(t_product(a, b), c), t_product(a, t_product(b, c)), **TIGHT)
    assert torch.equal(block_circulant(t_transpose(a)), block_circulant(a).T)
    assert torch.equal(t_transpose(t_transpose(a)), a)
    torch.testing.assert_close(torch.fft.fft(a, dim=0).abs().square().sum() / count, a.square().sum(), **TIGHT)
    assert t_identity(2, count, torch.float32).dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(SHAPES)
def test_the_tsvd_gives_the_tensor_back_from_orthonormal_and_diagonal_parts(shape):
    a = random(*shape)
    u, s, v = t_svd(a)
    rank = min(shape[1:])
    torch.testing.assert_close(t_product(t_product(u, s), t_transpose(v)), a, **TIGHT)
    for side in (u, v):
        torch.testing.assert_close(t_product(t_transpose(side), side), t_identity(rank, shape[0]), **TIGHT)
    assert u.dtype == s.dtype == v.dtype == torch.float64
    tubes = torch.diagonal(s, dim1=1, dim2=2)
    assert torch.equal(torch.diag_embed(tubes), s)
    torch.testing.assert_close(tubes, torch.cat([tubes[:1], tubes[1:].flip(0)]), **TIGHT)      # the tubes are even
    assert (tubes[0].diff() <= 1e-12).all()


@pytest.mark.parametrize("count", COUNTS)
def test_the_tsvd_is_real_whatever_phases_a_complex_svd_returns(count, monkeypatch):
    plain = torch.linalg.svd

    def turned(slices: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = plain(slices, full_matrices=full_matrices)
        phases = torch.polar(torch.ones_like(s), s) if slices.is_complex() else torch.ones_like(s)
        return u * phases[..., None, :], s, phases.conj()[..., None] * vh

    monkeypatch.setattr(torch.linalg, "svd", turned)
    a = random(count, 3, 4)
    u, s, v = t_svd(a)
    torch.testing.assert_close(t_product(t_product(u, s), t_transpose(v)), a, **TIGHT)
    torch.testing.assert_close(t_product(t_transpose(u), u), t_identity(3, count), **TIGHT)


@pytest.mark.parametrize("count", COUNTS)
def test_singular_values_are_those_of_the_block_circulant_matrix(count):
    a = random(count, 3, 4)
    tubes = torch.fft.fft(torch.diagonal(t_svd(a)[1], dim1=1, dim2=2), dim=0)
    assert tubes.imag.abs().max() < 1e-12
    expected = torch.linalg.svdvals(block_circulant(a))
    torch.testing.assert_close(tubes.real.flatten().sort(descending=True).values, expected, **TIGHT)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_truncated_tubes_lose_what_eckart_and_young_say(count, rank):
    a = random(count, 3, 4)
    u, s, v = t_svd(a)
    small_u, small_s, small_v = t_svd(a, rank)
    assert small_u.shape == (count, 3, rank) and small_s.shape == (count, rank, rank) and small_v.shape == (count, 4, rank)
    cut = t_product(t_product(u[:, :, :rank], s[:, :rank, :rank]), t_transpose(v[:, :, :rank]))
    product = t_product(t_product(small_u, small_s), t_transpose(small_v))
    torch.testing.assert_close(product, cut, **TIGHT)
    values = torch.linalg.svdvals(torch.fft.fft(a, dim=0))
    torch.testing.assert_close((a - product).square().sum(), values[:, rank:].square().sum() / count, **TIGHT)


@pytest.mark.parametrize("count", COUNTS)
def test_one_rank_for_each_frequency_is_never_worse_than_one_for_all(count):
    a = random(count, 4, 5) + 2 * random(1, 4, 5, seed=1)
    keep = 2
    u, s, vh = torch.linalg.svd(torch.fft.rfft(a, dim=0), full_matrices=False)
    multiplicity = torch.tensor([1.0 if 2 * k % count == 0 else 2.0 for k in range(count // 2 + 1)], dtype=torch.float64)
    # Entries by size; a pair costs two. Stop where the next one does not fit: at most the cost of the tubes.
    order = torch.argsort(s.flatten(), descending=True)
    costs = multiplicity[:, None].expand_as(s).flatten()[order].cumsum(0)
    mask = torch.zeros(s.numel(), dtype=torch.bool)
    mask[order[costs <= keep * count]] = True
    mask = mask.view_as(s)
    rest = torch.fft.irfft((u * (s * mask).unsqueeze(1)) @ vh, n=count, dim=0) - a
    lost = (multiplicity[:, None] * s.square() * ~mask).sum() / count
    torch.testing.assert_close(rest.square().sum(), lost, **TIGHT)
    left, middle, right = t_svd(a, keep)
    tubal = t_product(t_product(left, middle), t_transpose(right))
    spare = (multiplicity[:, None] * s.square())[~mask].max() / count                # the one entry that may not have fitted
    assert rest.square().sum() <= (a - tubal).square().sum() + spare


@pytest.mark.parametrize("shape", [(6, 4, 1), (4, 6, 2), (5, 5, 3), (3, 7, 4), (7, 3, 5), (6, 6, 8)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_against_the_port_of_the_toolbox(shape, rank):
    d1, d2, count = shape
    a = t_product(random(count, d1, rank), random(count, rank, d2, seed=1))
    last = a.movedim(0, 2).numpy()
    assert tubal_rank(a) == toolbox_tubal_rank(last) == rank
    u, s, v = toolbox_tsvd(last)
    assert max(np.abs(part.imag).max() for part in (u, s, v)) < 1e-12
    ours = t_svd(a, tubal_rank(a))
    assert [part.shape for part in ours] == [(part.shape[2], *part.shape[:2]) for part in (u, s, v)]
    np.testing.assert_allclose(ours[1].movedim(0, 2).numpy(), s.real, atol=1e-12)
    theirs = [torch.from_numpy(part.real.copy()).movedim(2, 0) for part in (u, s, v)]
    for left, middle, right in (ours, theirs):
        torch.testing.assert_close(t_product(t_product(left, middle), t_transpose(right)), a, atol=1e-11, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_ranks_of_a_tensor_made_with_given_ranks(half):
    a = of_multi_rank(half, 4, 5)
    ranks = multi_rank(a)
    assert ranks == half + half[:0:-1]
    assert tubal_rank(a) == max(half)
    assert average_rank(a) == sum(ranks) / len(ranks)
    assert average_rank(a) * len(a) == pytest.approx(float(torch.linalg.matrix_rank(block_circulant(a), atol=1e-9, rtol=0.0)))


def test_ranks_at_even_counts_in_float32_and_with_a_tolerance():
    shared = random(1, 6, 4, dtype=torch.float32).expand(4, 6, 4)
    assert multi_rank(shared) == [4, 0, 0, 0] and tubal_rank(shared) == 4 and average_rank(shared) == 1.0
    alternating = shared * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None, None]
    assert multi_rank(alternating) == [0, 0, 4, 0]
    assert tubal_rank(torch.zeros(3, 2, 2)) == 0 and multi_rank(torch.zeros(3, 2, 2)) == [0, 0, 0]
    single = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None]
    assert [tubal_rank(single, tolerance) for tolerance in (0.5, 1.5, 2.5, 3.5)] == [3, 2, 1, 0]
    assert multi_rank(single, 1.5) == [2] and average_rank(single, 1.5) == 2.0


def test_slices_without_entries():
    empty = torch.zeros(3, 0, 2)
    assert t_product(torch.zeros(3, 2, 0), empty).tolist() == torch.zeros(3, 2, 2).tolist()
    assert [tuple(part.shape) for part in t_svd(empty)] == [(3, 0, 0), (3, 0, 0), (3, 2, 0)]
    assert multi_rank(empty) == [0, 0, 0] and tubal_rank(empty) == 0 and block_circulant(empty).shape == (0, 6)


@pytest.mark.parametrize("count", COUNTS)
def test_products_and_svd_by_a_transform(count):
    a, b, matrix = random(count, 3, 4), random(count, 4, 2, seed=1), orthonormal(count, seed=2)
    loop = torch.stack([sum(matrix[k, i] * a[i] for i in range(count)) for k in range(count)])
    torch.testing.assert_close(transform(a, matrix), loop, **TIGHT)
    torch.testing.assert_close(transform(a, matrix).square().sum(), a.square().sum(), **TIGHT)
    torch.testing.assert_close(transform(transform(a, matrix), matrix.T), a, **TIGHT)
    product = torch.stack([transform(a, matrix)[k] @ transform(b, matrix)[k] for k in range(count)])
    torch.testing.assert_close(transform(m_product(a, b, matrix), matrix), product, **TIGHT)
    torch.testing.assert_close(m_product(a, b, torch.eye(count, dtype=a.dtype)), a @ b, **TIGHT)
    u, s, v = m_svd(a, matrix)
    assert u.shape == (count, 3, 3) and s.shape == (count, 3) and v.shape == (count, 4, 3)
    torch.testing.assert_close((u * s[:, None]) @ v.mT, transform(a, matrix), **TIGHT)
    assert transform(a, random(count + 2, count)).shape == (count + 2, 3, 4)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 20))
def test_the_largest_terms_by_a_transform_lose_the_energy_of_the_others(shape, terms):
    a, matrix = random(*shape), orthonormal(shape[0], seed=1)
    u, s, v = m_svd(a, matrix)
    order = torch.argsort(s.flatten(), descending=True)[:terms]
    kept = torch.zeros(s.numel(), dtype=s.dtype).index_put((order,), s.flatten()[order]).view_as(s)
    cut = transform((u * kept[:, None]) @ v.mT, matrix.T)
    torch.testing.assert_close((a - cut).square().sum(), (s - kept).square().sum(), **TIGHT)
    rank = min(shape[1:]) // 2
    fewer = m_svd(a, matrix, rank)
    torch.testing.assert_close(fewer[1], s[:, :rank], **TIGHT)
    assert fewer[0].shape[-1] == fewer[2].shape[-1] == rank


@pytest.mark.parametrize("count", [2, 5])
def test_the_t_product_is_the_product_by_the_unitary_dft_times_a_root(count):
    a, b = random(count, 3, 4), random(count, 4, 2, seed=1)
    spectra = [torch.fft.fft(x, dim=0, norm="ortho") for x in (a, b)]
    product = torch.fft.ifft(spectra[0] @ spectra[1], dim=0, norm="ortho").real
    torch.testing.assert_close(t_product(a, b), product * count ** 0.5, **TIGHT)


def test_float32_stays_float32():
    a, b = random(6, 5, 4, dtype=torch.float32), random(6, 4, 3, seed=1, dtype=torch.float32)
    matrix = transforms.dct(6).weights
    results = [t_product(a, b), *t_svd(a), transform(a, matrix), m_product(a, b, matrix), *m_svd(a, matrix), *t_svd(a, 0)]
    assert {result.dtype for result in results} == {torch.float32}
    u, s, v = t_svd(a)
    torch.testing.assert_close(t_product(t_product(u, s), t_transpose(v)), a, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 4])
def test_the_correlation_over_depth_of_known_cases(count):
    assert depth_correlation(3 * torch.eye(count)) == pytest.approx(1 / count)
    factors = torch.arange(1.0, count + 1) * torch.tensor([1.0, -1.0] * count)[:count]
    assert depth_correlation(torch.outer(factors, factors)) == pytest.approx(1.0)
    assert depth_correlation(torch.zeros(count, count)) == 0.0
    assert depth_correlation(1e-300 * torch.eye(count, dtype=torch.float64)) == pytest.approx(1 / count)


def test_the_correlation_of_a_shared_and_an_own_part():
    assert depth_correlation(torch.tensor([[2.0, 1.0], [1.0, 2.0]], requires_grad=True)) == pytest.approx(0.75)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), SIZES, SIZES)
def test_the_gram_matrix_of_low_rank_increments_is_that_of_the_dense_ones(ranks, d_in, d_out):
    downs = [random(r, d_in, seed=i, dtype=torch.float32).requires_grad_() for i, r in enumerate(ranks)]
    scales = [random(r, seed=10 + i, dtype=torch.float32) for i, r in enumerate(ranks)]
    ups = [random(d_out, r, seed=20 + i, dtype=torch.float32) for i, r in enumerate(ranks)]
    dense = torch.stack([(up.double() * scale.double() @ down.detach().double()).flatten()
                         for up, scale, down in zip(ups, scales, downs, strict=True)])
    gram = low_rank_gram(downs, scales, ups)
    assert gram.dtype == torch.float64 and not gram.requires_grad and torch.equal(gram, gram.T)
    torch.testing.assert_close(gram, dense @ dense.T, **TIGHT)


@pytest.mark.parametrize(("call", "words"), [
    (lambda: t_product(random(2, 3, 4), random(2, 3, 4)), r"\(N, p, d2\).*\(2, 3, 4\)"),
    (lambda: t_product(random(2, 3, 4), random(3, 4, 3)), "one dtype"),
    (lambda: m_product(random(2, 3, 4), random(2, 4, 3, dtype=torch.float32), torch.eye(2)), "one dtype"),
    (lambda: t_transpose(random(3, 4)), r"\(N, d1, d2\)"),
    (lambda: t_svd(torch.zeros(0, 2, 2)), "1 or more"),
    (lambda: t_svd(torch.zeros(2, 2, 2, dtype=torch.bfloat16)), "bfloat16"),
    (lambda: t_svd(random(2, 3, 4), 4), "0 to 3, got 4"),
    (lambda: m_svd(random(2, 3, 4), torch.eye(2), -1), "0 to 3, got -1"),
    (lambda: m_svd(random(2, 3, 4), 2 * torch.eye(2)), "orthonormal.*by 3"),
    (lambda: m_svd(random(2, 3, 4), torch.eye(2) * torch.nan), "orthonormal"),
    (lambda: m_svd(random(2, 3, 4), torch.eye(3)[:, :2]), r"must be \(2, 2\)"),
    (lambda: transform(random(2, 3, 4), torch.eye(3)), "2 columns"),
    (lambda: t_identity(2, 0), "1 or more slices"),
    (lambda: depth_correlation(torch.zeros(2, 3)), "square"),
    (lambda: low_rank_gram([], [], []), "1 or more layers"),
    (lambda: low_rank_gram([random(1, 2)] * 2, [random(1)] * 2, [random(3, 1), random(4, 1)]), "one shape"),
])
def test_what_does_not_fit_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_gram_matrix_that_is_not_finite_is_named():
    with pytest.raises(NonFiniteError, match="1 of 4 entries"):
        depth_correlation(torch.tensor([[1.0, 0.0], [0.0, torch.inf]]))
