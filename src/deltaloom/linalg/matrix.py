"""Low-rank approximation of matrices: the best of a rank, in the Frobenius norm or in the norm that inputs give.

A weight W (d_out, d_in) and the Gram matrix G = sum of x x^T of its inputs: the squared error of the outputs of W' is
tr((W - W') G (W - W')^T). Its minimum over rank r keeps the r main directions U of the outputs, the eigenvectors of
W G W^T: W' = U (U^T W), and the error is the sum of the eigenvalues left out. Without G it is Eckart and Young's. That is
the truncation of SVD-LLM (Wang et al., ICLR 2025, "truncation-aware data whitening"), whose inverse of a Cholesky factor
cancels; nothing has to be inverted, so that a singular G is no special case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaloom.errors import NonFiniteError


@torch.no_grad()
def output_directions(weight: Tensor, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(energies (k,) descending, directions (d_out, k)) of the outputs of a weight (d_out, d_in), k = min(d_out, d_in).

    Energies are the eigenvalues of W G W^T, the squared singular values of W where no Gram matrix (d_in, d_in) is given.
    float64; decomposed on the smaller side.

    Raises:
        ValueError: the shapes do not fit. NonFiniteError: entries that are NaN or infinite.
    """
    matrix = _checked(weight, gram)
    d_out, d_in = matrix.shape
    if d_out <= d_in:
        values, directions = torch.linalg.eigh(_outer(matrix, gram))
        return values.flip(0).clamp(min=0), directions.flip(1)
    root = matrix if gram is None else matrix @ _root(gram)
    values, rights = torch.linalg.eigh(root.T @ root)
    values, rights = values.flip(0).clamp(min=0), rights.flip(1)
    return values, torch.linalg.qr(root @ rights)[0]  # orthogonal already; those without energy become directions too


@torch.no_grad()
def best_of_rank(weight: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(left (d_out, rank), right (rank, d_in)): the best approximation of a weight of that rank, float64; see the module.

    Raises:
        ValueError: a rank outside 0 to min(d_out, d_in).
    """
    if not 0 <= rank <= min(weight.shape):
        raise ValueError(f"the rank of a {tuple(weight.shape)} matrix is 0 to {min(weight.shape)}, got {rank}")
    left = output_directions(weight, gram)[1][:, :rank]
    return left, left.T @ weight.detach().double()


@torch.no_grad()
def leading(matrix: Tensor, rank: int) -> Tensor:
    """The eigenvectors (d, rank) of a symmetric matrix (d, d) with the largest eigenvalues, largest first; float64."""
    return torch.linalg.eigh((matrix + matrix.T).double() / 2)[1].flip(1)[:, :rank]


@torch.no_grad()
def refitted_left(weight: Tensor, right: Tensor, gram: Tensor) -> Tensor:
    """left (d_out, r) with the least output error of left @ right for a weight and its inputs' Gram matrix; float64.

    left = W G B^T (B G B^T)^+ with B the right factor (r, d_in); the pseudo-inverse, as bases may hold more than inputs reach.
    """
    product = gram.double() @ right.detach().double().T
    inverse = torch.linalg.pinv(right.detach().double() @ product, hermitian=True)
    return weight.detach().double() @ product @ inverse


@torch.no_grad()
def output_error(change: Tensor, gram: Tensor | None = None) -> float:
    """The squared error of the outputs by a change (d_out, d_in) of the weight; without Gram its squared Frobenius norm."""
    matrix = _checked(change, gram)
    return float((matrix * (matrix if gram is None else matrix @ gram.double())).sum().clamp(min=0))


@torch.no_grad()
def product_directions(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of left (d_out, r) @ right (r, d_in) without forming it: u (d_out, k), s (k,), v (d_in, k), float64.

    k = min(r, d_out, d_in): QR of both factors, then the SVD of a small matrix.

    Raises:
        ValueError: the shapes do not fit.
    """
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"factors are (d_out, r) and (r, d_in), got {tuple(left.shape)} and {tuple(right.shape)}")
    q, upper = torch.linalg.qr(left.detach().double())
    p, lower = torch.linalg.qr(right.detach().double().T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return q @ u, s, p @ vh.T


def ridged(gram: Tensor, ridge: float) -> Tensor:
    """The Gram matrix with `ridge` times the mean of its diagonal on the diagonal: directions without data count a little."""
    return gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def _root(gram: Tensor) -> Tensor:
    """R with R R^T = G for a positive semidefinite G, float64: the Cholesky factor, or by eigenvalues where there is none."""
    lower, failed = torch.linalg.cholesky_ex(gram.double())
    if not int(failed):
        return lower
    values, vectors = torch.linalg.eigh(gram.double())
    return vectors * values.clamp(min=0).sqrt()


def _outer(matrix: Tensor, gram: Tensor | None) -> Tensor:
    product = matrix @ matrix.T if gram is None else matrix @ gram.double() @ matrix.T
    return (product + product.T) / 2


def _checked(weight: Tensor, gram: Tensor | None) -> Tensor:
    if weight.dim() != 2 or (gram is not None and gram.shape != (weight.shape[1], weight.shape[1])):
        raise ValueError("a weight is (d_out, d_in) and its Gram matrix (d_in, d_in), "
                         f"got {tuple(weight.shape)} and {None if gram is None else tuple(gram.shape)}")
    matrix = weight.detach().double()
    for what, tensor in (("weight", matrix), ("Gram matrix", gram)):
        if tensor is not None and not tensor.isfinite().all():
            raise NonFiniteError(f"the {what} of a layer has entries that are no finite numbers",
                                 got=f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} entries")
    return matrix
