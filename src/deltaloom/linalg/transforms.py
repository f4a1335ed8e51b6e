"""Transforms over the layers: how F components, each a low-rank matrix of its own, add up to the changes of N layers.

Every transform is a `LayerTransform`, two small matrices of coefficients, so that one delta serves all of them. Entries
that vanish are exactly 0.0, so that a layer can leave out the components that do not reach it.

Which one suits depends on the layers: `identity` shares nothing, `dct`, `dft` and `haar` bet on changes that are smooth or
blockwise in depth, `data` and `rotation` find what is common, `frame` lets each layer have its own and all a shared part.
`depth_correlation` measures whether there is anything to share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaloom.linalg.tensor import checked_gram


@dataclass(frozen=True, eq=False)
class LayerTransform:
    """How F components spread over N layers. Component f contributes to layer l:

    width 1: weights[f, l] * u v^T, for u (d1,) and v (d2,);
    width 2: weights[f, l] * (a c^T + b e^T) + turns[f, l] * (a e^T - b c^T), for u = a + ib and v = c + ie: the real part
    of (weights + i turns) u v^H, the contribution of a pair of conjugate frequencies of the DFT.

    A component of unit norms |u| = |v| = 1 has unit energy: its squared Frobenius norm summed over the layers is 1.
    """

    weights: Tensor
    """(F, N), float64."""
    turns: Tensor | None
    """(F, N), float64; None where all widths are 1."""
    width: tuple[int, ...]
    """Real columns of each component: 1 or 2."""

    def __post_init__(self) -> None:
        if self.weights.dim() != 2 or len(self.width) != len(self.weights) or not set(self.width) <= {1, 2}:
            raise ValueError("a transform has weights (F, N) and F widths of 1 or 2, "
                             f"got weights {tuple(self.weights.shape)} and widths {self.width}")
        if (self.turns is None) == (2 in self.width) or (self.turns is not None and self.turns.shape != self.weights.shape):
            shape = None if self.turns is None else tuple(self.turns.shape)
            raise ValueError("turns have the shape of the weights where a width is 2, and are None where all are 1, "
                             f"got {shape} for weights {tuple(self.weights.shape)} and widths {self.width}")

    @property
    def components(self) -> int:
        """F, the number of components."""
        return self.weights.shape[0]

    @property
    def layers(self) -> int:
        """N, the number of layers."""
        return self.weights.shape[1]


def identity(n: int) -> LayerTransform:
    """One component for each of n layers, nothing shared: n independent low-rank changes."""
    _check_layers(n)
    return _real(torch.eye(n, dtype=torch.float64))


def dct(n: int) -> LayerTransform:
    """The orthonormal DCT-II over n layers: sqrt(2/n) cos(pi f (2l + 1) / (2n)), row 0 the mean 1/sqrt(n).

    Smooth in depth; the first and the last layer are no neighbours, unlike with `dft`.
    """
    _check_layers(n)
    weights = math.sqrt(2 / n) * _cosine(torch.arange(n)[:, None] * (2 * torch.arange(n) + 1), 4 * n)
    weights[0] = 1 / math.sqrt(n)
    return _real(weights)


def haar(n: int) -> LayerTransform:
    """The orthonormal Haar wavelets over n layers, any n: the mean, then differences of the halves of ever smaller blocks.

    A block of a left and b right layers has sqrt(b / (a (a + b))) on its left and -sqrt(a / (b (a + b))) on its right part;
    rows go from coarse to fine. At most 1 + ceil(log2 n) components reach a layer.
    """
    _check_layers(n)
    rows = [torch.full((n,), 1 / math.sqrt(n), dtype=torch.float64)]
    blocks = [(0, n)]
    for low, high in blocks:                                           # grows while it is walked: breadth first
        if high - low < 2:
            continue
        middle = (low + high + 1) // 2
        left, right = middle - low, high - middle
        row = torch.zeros(n, dtype=torch.float64)
        row[low:middle] = math.sqrt(right / (left * (left + right)))
        row[middle:high] = -math.sqrt(left / (right * (left + right)))
        rows.append(row)
        blocks += [(low, middle), (middle, high)]
    return _real(torch.stack(rows))


def dft(n: int) -> LayerTransform:
    """The DFT over n layers in real arithmetic: floor(n/2) + 1 components, one for each frequency of half the spectrum.

    A pair of frequencies f and n - f contributes sqrt(2/n) Re(exp(2 pi i f l / n) u v^H) to layer l and has width 2.
    Frequency 0 and, for even n, n/2 are real, width 1, with sqrt(1/n) in place of sqrt(2/n). The components that rfft with
    norm="ortho" gives are those of the pairs divided by sqrt(2). Real columns are n in all, as in the other transforms.
    """
    _check_layers(n)
    frequencies = torch.arange(n // 2 + 1)
    width = tuple(1 if 2 * f % n == 0 else 2 for f in range(n // 2 + 1))
    scale = torch.tensor([math.sqrt(w / n) for w in width], dtype=torch.float64)[:, None]
    steps = frequencies[:, None] * torch.arange(n)
    turns = None
    if 2 in width:
        turns = scale * _cosine(4 * steps - n, 4 * n)                  # sin x = cos(x - pi/2)
    return LayerTransform(scale * _cosine(steps, n), turns, width)


def frame(n: int) -> LayerTransform:
    """n + 1 components: one for each layer, and the mean 1/sqrt(n) that all layers share.

    Overcomplete: the rows are no orthonormal basis, a change has more than one representation, and truncating it by the
    size of components is not the best approximation. Two components reach each layer.
    """
    _check_layers(n)
    shared = torch.full((1, n), 1 / math.sqrt(n), dtype=torch.float64)
    return _real(torch.cat([torch.eye(n, dtype=torch.float64), shared]))


def data(gram: Tensor) -> LayerTransform:
    """The eigenvectors of a Gram matrix (N, N), of the layers' gradients or changes, largest eigenvalue first.

    Of each row, the first among the entries of largest size is positive. Rows of one eigenvalue are any orthonormal basis
    of their space; which one can differ between machines, so save the transform with what was trained with it.

    Raises:
        ValueError: not a square matrix.
        NonFiniteError: entries that are NaN or infinite.
    """
    rows = torch.linalg.eigh(checked_gram(gram)).eigenvectors.T.flip(0)
    sizes = rows.abs()
    # Entries of one size differ by rounding: without the margin the sign would be drawn by it.
    first = (sizes >= sizes.amax(1, keepdim=True) * (1 - 1e-9)).double().argmax(1, keepdim=True)
    return _real(rows * rows.gather(1, first).sign())


def rotation(skew_upper: Tensor, start: Tensor) -> Tensor:
    """A learned transform: expm(A - A^T) @ start, orthonormal whenever `start` is, differentiable in both.

    skew_upper (n(n-1)/2,): the entries of A above its diagonal, row by row; zeros give `start` (n, n) itself. The result has
    the dtype of `start`; put it into `LayerTransform(weights, None, (1,) * n)`.

    Raises:
        ValueError: the shapes do not fit.
    """
    n = start.shape[0]
    if start.shape != (n, n) or skew_upper.shape != (n * (n - 1) // 2,):
        raise ValueError("a rotation takes n(n-1)/2 numbers and a square start (n, n), "
                         f"got the shapes {tuple(skew_upper.shape)} and {tuple(start.shape)}")
    rows, columns = torch.triu_indices(n, n, offset=1, device=start.device)
    upper = start.new_zeros(n, n).index_put((rows, columns), skew_upper.to(start))
    return torch.linalg.matrix_exp(upper - upper.T) @ start


def reconstruct(transform: LayerTransform, us: Sequence[Tensor], ss: Sequence[Tensor], vs: Sequence[Tensor]) -> Tensor:
    """The dense changes (N, d1, d2) of all layers, in the dtype of the weights: the definition as a sum, for checks.

    For component f of rank r_f, 0 allowed: us[f] (d1, width r_f), ss[f] (r_f,), vs[f] (d2, width r_f). Of width 2 the first
    r_f columns are real parts and the last r_f imaginary parts.

    Raises:
        ValueError: not one u, s and v for each component.
    """
    if not len(us) == len(ss) == len(vs) == transform.components:
        raise ValueError(f"the transform has {transform.components} components, got {len(us)}, {len(ss)} and {len(vs)} factors")
    weights, turns = transform.weights, transform.turns
    total = weights.new_zeros(transform.layers, us[0].shape[0], vs[0].shape[0])
    for f, width in enumerate(transform.width):
        u, s, v = us[f].to(weights), ss[f].to(weights), vs[f].to(weights)
        if width == 1:
            total = total + weights[f, :, None, None] * ((u * s) @ v.T)
            continue
        (a, b), (c, e) = (u * torch.cat([s, s])).chunk(2, dim=1), v.chunk(2, dim=1)
        total = total + weights[f, :, None, None] * (a @ c.T + b @ e.T)
        if turns is not None:
            total = total + turns[f, :, None, None] * (a @ e.T - b @ c.T)
    return total


def _cosine(steps: Tensor, period: int) -> Tensor:
    """cos(2 pi steps / period) in float64 for integer steps, exact at multiples of a quarter turn.

    Without that, entries that vanish would be 6e-17, and components would reach layers that they do not reach.
    """
    left = steps % period
    values = torch.cos(left.double() * (2 * math.pi / period))
    values[(4 * left == period) | (4 * left == 3 * period)] = 0.0
    return values


def _real(weights: Tensor) -> LayerTransform:
    return LayerTransform(weights, None, (1,) * len(weights))


def _check_layers(n: int) -> None:
    if n < 1:
        raise ValueError(f"a transform spans 1 or more layers, got {n}")
