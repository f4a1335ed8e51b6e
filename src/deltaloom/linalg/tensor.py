"""The algebra of third-order tensors over a stack of layers: t-product, t-SVD, their transform-based twins, ranks.

A tensor is (N, d1, d2): N frontal slices, one for each layer, first, so that batched matrix products apply. The literature
writes (d1, d2, N); its mode 3 is dimension 0 here. All functions are pure and work in float32 and float64, on any device.

Sources: Kilmer, Martin, "Factorization strategies for third-order tensors" (2011): t-product, t-SVD. Lu et al., "Tensor
robust principal component analysis with a new tensor nuclear norm" (TPAMI 2019): symmetric completion, ranks. Kernfeld,
Kilmer, Aeron, "Tensor-tensor products with invertible linear transforms" (2015): products by a transform. Kilmer, Horesh,
Avron, Newman, "Tensor-tensor algebra for optimal representation and compression" (PNAS 2021): Eckart-Young for both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltaloom.errors import NonFiniteError


def t_product(a: Tensor, b: Tensor) -> Tensor:
    """The circular convolution of slices along the stack: (N, d1, p) * (N, p, d2) -> (N, d1, d2).

    Slice l of the product is the sum over j of a[(l - j) mod N] @ b[j], computed as one matrix product per frequency.

    Raises:
        ValueError: the shapes do not fit.
    """
    _check_product(a, b)
    return _from_spectrum(_spectrum(a) @ _spectrum(b), len(a))


def t_transpose(a: Tensor) -> Tensor:
    """(N, d1, d2) -> (N, d2, d1): each slice transposed, and the order of slices 1 to N-1 reversed."""
    _check_stack(a)
    return torch.cat([a[:1], a[1:].flip(0)]).mT


def t_identity(n: int, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The neutral element of the t-product, (count, n, n): the identity in slice 0, zeros in the others."""
    if n < 0 or count < 1:
        raise ValueError(f"an identity tensor needs a size of 0 or more and 1 or more slices, got {n} and {count}")
    out = torch.zeros(count, n, n, dtype=dtype)
    out[0] = torch.eye(n, dtype=dtype)
    return out


def block_circulant(a: Tensor) -> Tensor:
    """(N, d1, d2) -> (N d1, N d2): block (i, j) is slice (i - j) mod N. For checks; nothing here computes with it."""
    _check_stack(a)
    count, rows, columns = a.shape
    index = torch.arange(count, device=a.device)
    blocks = a[(index[:, None] - index) % count]                      # (i, j, d1, d2)
    return blocks.transpose(1, 2).reshape(count * rows, count * columns)


def t_svd(a: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The skinny t-SVD: a = u * s * t_transpose(v), or its best approximation of that tubal rank.

    u (N, d1, r) and v (N, d2, r) have orthonormal columns (t_transpose(u) * u is the identity tensor), s (N, r, r) is
    f-diagonal, its tubes sorted by s[0, i, i], the mean of the i-th singular value over all frequencies. r is `rank`, or
    min(d1, d2). Only half the spectrum is decomposed and the rest completed by conjugation, and the slices that are real
    (frequency 0, and N/2 for even N) get a real SVD: with anything else u and v would be complex.

    u and v are unique only up to a common phase of each singular vector: compare products and singular values.

    Raises:
        ValueError: not a stack of matrices, or a rank outside 0 to min(d1, d2).
    """
    _check_stack(a)
    keep = _checked_rank(a, rank)
    spectrum = _spectrum(a)
    middle = (len(a) + 1) // 2                                         # pairs are 1 to middle - 1, Nyquist comes after them
    parts = [_svd(spectrum[:1].real, keep), _svd(spectrum[1:middle], keep), _svd(spectrum[middle:].real, keep)]
    u, s, v = (_from_spectrum(torch.cat([part[i].to(spectrum.dtype) for part in parts]), len(a)) for i in range(3))
    return u, torch.diag_embed(s), v


def transform(a: Tensor, matrix: Tensor) -> Tensor:
    """Mix the slices by a matrix (K, N): (N, d1, d2) -> (K, d1, d2), slice k the sum over l of matrix[k, l] a[l].

    Raises:
        ValueError: the matrix has another number of columns than `a` has slices.
    """
    _check_stack(a)
    if matrix.dim() != 2 or matrix.shape[1] != len(a):
        raise ValueError(f"a transform of {len(a)} slices is a matrix with {len(a)} columns, got the shape {tuple(matrix.shape)}")
    return torch.einsum("kl,lij->kij", matrix.to(a), a)


def m_product(a: Tensor, b: Tensor, matrix: Tensor) -> Tensor:
    """The product by an orthonormal transform (N, N): (N, d1, p), (N, p, d2) -> (N, d1, d2).

    Both are transformed, multiplied slice by slice, and transformed back. The unitary DFT in place of `matrix` gives the
    t-product divided by sqrt(N); the identity gives N independent matrix products.

    Raises:
        ValueError: the shapes do not fit, or the matrix is not orthonormal.
    """
    _check_product(a, b)
    _check_orthonormal(matrix, len(a))
    return transform(transform(a, matrix) @ transform(b, matrix), matrix.T)


def m_svd(a: Tensor, matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD by an orthonormal transform (N, N), left in the transform domain: u (N, d1, r), s (N, r), v (N, d2, r).

    transform(a, matrix)[k] = u[k] diag(s[k]) v[k]^T; going back is transform(..., matrix.T). Keeping the largest s over all
    (k, i) is the best approximation of `a` by so many terms in the Frobenius norm; r is `rank`, or min(d1, d2).

    Raises:
        ValueError: the matrix is not orthonormal, or a rank outside 0 to min(d1, d2).
    """
    _check_stack(a)
    _check_orthonormal(matrix, len(a))
    return _svd(transform(a, matrix), _checked_rank(a, rank))


def tubal_rank(a: Tensor, tolerance: float | None = None) -> int:
    """The number of non-zero singular tubes: the largest rank of a slice of the spectrum.

    Tube i counts if the sum of its singular values over all frequencies, divided by N^2, is above the tolerance. Without
    one it is max(d1, d2) times the distance from the largest such value to the next floating-point number: the rule of
    the function tubalrank of Lu's toolbox.
    """
    values = _full_spectrum_values(a).sum(0) / len(a) ** 2
    return int((values > _threshold(a, values, tolerance)).sum())


def multi_rank(a: Tensor, tolerance: float | None = None) -> list[int]:
    """The ranks of the N slices of the spectrum (unnormalised DFT), equal for k and N - k.

    A singular value counts if it is above the tolerance. Without one it is max(d1, d2) times the distance from the largest
    of all slices to the next floating-point number; one threshold for all, so that a slice of rounding noise has rank 0.
    """
    values = _full_spectrum_values(a)
    return [int(count) for count in (values > _threshold(a, values, tolerance)).sum(1)]


def average_rank(a: Tensor, tolerance: float | None = None) -> float:
    """The mean of `multi_rank`: the rank of the block-circulant matrix over N."""
    ranks = multi_rank(a, tolerance)
    return sum(ranks) / len(ranks)


def depth_correlation(gram: Tensor) -> float:
    """How much the layers' increments have in common: the largest eigenvalue of their Gram matrix (N, N) over its trace.

    1/N: orthogonal to one another and of equal norm, nothing to share; 1: all the same up to a factor; 0: a zero matrix.

    Raises:
        ValueError: not a square matrix.
        NonFiniteError: entries that are NaN or infinite.
    """
    matrix = checked_gram(gram)
    trace = float(matrix.trace())
    if trace <= 0:
        return 0.0
    return min(1.0, float(torch.linalg.eigvalsh(matrix / trace)[-1]))


@torch.no_grad()
def low_rank_gram(downs: Sequence[Tensor], scales: Sequence[Tensor], ups: Sequence[Tensor]) -> Tensor:
    """The inner products (N, N) of the increments dW_l = up_l diag(scale_l) down_l, in float64, without making any.

    down (r_l, d_in), scale (r_l,), up (d_out, r_l) for each layer; ranks may differ and be 0. With R the sum of ranks it
    takes R^2 (d_in + d_out) multiplications, and memory for R (d_in + d_out) numbers.

    Raises:
        ValueError: the three lists differ in length or are empty, or the layers differ in shape.
    """
    if not len(downs) == len(scales) == len(ups) or not ups:
        raise ValueError("a Gram matrix needs a down, a scale and an up for each of 1 or more layers, "
                         f"got {len(downs)}, {len(scales)} and {len(ups)}")
    shapes = {(up.shape[0], down.shape[1]) for up, down in zip(ups, downs, strict=True)}
    if len(shapes) > 1:
        raise ValueError(f"the layers must have one shape (d_out, d_in), got {sorted(shapes)}")
    rights = [scale.double()[:, None] * down.double() for scale, down in zip(scales, downs, strict=True)]
    lefts = [up.double() for up in ups]
    right, left = torch.cat(rights), torch.cat(lefts, dim=1)
    ranks = torch.tensor([len(scale) for scale in scales], device=right.device)
    owner = torch.repeat_interleave(torch.eye(len(ranks), dtype=right.dtype, device=right.device), ranks, dim=0)    # (R, N)
    # <up_l down_l, up_m down_m> is the sum over pairs of terms of (up_l^T up_m) times (down_l down_m^T).
    rows = [((u.T @ left) * (d @ right.T)).sum(0) @ owner for u, d in zip(lefts, rights, strict=True)]
    gram = torch.stack(rows)
    return (gram + gram.T) / 2


def checked_gram(gram: Tensor) -> Tensor:
    """A Gram matrix as a symmetric float64 matrix without gradient.

    Raises:
        ValueError: not a square matrix.
        NonFiniteError: entries that are NaN or infinite.
    """
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise ValueError(f"a Gram matrix is square, one row for each layer, got the shape {tuple(gram.shape)}")
    matrix = gram.detach().double()
    if not matrix.isfinite().all():
        raise NonFiniteError("the Gram matrix of the layers has entries that are no finite numbers",
                             got=f"{int((~matrix.isfinite()).sum())} of {matrix.numel()} entries",
                             hint="A gradient or a change was not finite when it was made: lower the learning rate.")
    return (matrix + matrix.T) / 2


def _spectrum(a: Tensor) -> Tensor:
    """The first half of the unnormalised DFT along the stack: (N, ...) real -> (floor(N/2) + 1, ...) complex."""
    if not a.numel():                                                  # the FFT libraries refuse it
        return torch.zeros(len(a) // 2 + 1, *a.shape[1:], dtype=a.dtype.to_complex(), device=a.device)
    return torch.fft.rfft(a, dim=0)


def _from_spectrum(half: Tensor, count: int) -> Tensor:
    """The inverse of `_spectrum`; the count is needed, half a spectrum does not tell odd from even."""
    if not half.numel():
        return half.real.new_zeros(count, *half.shape[1:])
    return torch.fft.irfft(half, n=count, dim=0)


def _svd(slices: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest `keep` singular triplets of each matrix of (K, d1, d2): u, s and v, not its adjoint."""
    u, s, vh = torch.linalg.svd(slices, full_matrices=False)
    return u[..., :keep], s[..., :keep], vh.mH[..., :keep]


def _full_spectrum_values(a: Tensor) -> Tensor:
    """The singular values (N, min(d1, d2)) of all slices of the spectrum, from half of them."""
    _check_stack(a)
    values = torch.linalg.svdvals(_spectrum(a.detach()))
    index = torch.arange(len(a), device=a.device)
    return values[torch.minimum(index, len(a) - index)]


def _threshold(a: Tensor, values: Tensor, tolerance: float | None) -> Tensor:
    if tolerance is not None:
        return values.new_tensor(tolerance)
    largest = values.max() if values.numel() else values.new_zeros(())
    return max(a.shape[1:]) * (torch.nextafter(largest, largest.new_tensor(torch.inf)) - largest)


def _check_stack(a: Tensor) -> None:
    if a.dim() != 3 or not len(a):
        raise ValueError(f"a stack of matrices has the shape (N, d1, d2) with N of 1 or more, got {tuple(a.shape)}")
    if a.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"a stack of matrices is float32 or float64, got {a.dtype}; convert it with .float()")


def _check_product(a: Tensor, b: Tensor) -> None:
    _check_stack(a)
    _check_stack(b)
    if len(a) != len(b) or a.shape[2] != b.shape[1] or a.dtype != b.dtype:
        raise ValueError("a product takes (N, d1, p) and (N, p, d2) of one dtype, "
                         f"got {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}")


def _check_orthonormal(matrix: Tensor, count: int) -> None:
    if matrix.shape != (count, count):
        raise ValueError(f"the transform of {count} slices must be ({count}, {count}) here, got {tuple(matrix.shape)}")
    detached = matrix.detach()
    error = float((detached @ detached.T - torch.eye(count).to(detached)).abs().max())
    if not error <= torch.finfo(matrix.dtype).eps ** 0.5:
        raise ValueError(f"the transform must be orthonormal; its rows' inner products differ from the identity by {error:.2g}")


def _checked_rank(a: Tensor, rank: int | None) -> int:
    most = min(a.shape[1:])
    if rank is None:
        return most
    if not 0 <= rank <= most:
        raise ValueError(f"the rank of a stack of {a.shape[1]} x {a.shape[2]} matrices is 0 to {most}, got {rank}")
    return rank
