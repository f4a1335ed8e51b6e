"""Nearest rows of a table, in blocks; and which tokens a text shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 512  # rows at once: 512 x 50,000 distances are 100 MB


class Nearest:
    """Euclidean search over a table (entries, d), or over several views of the entries (views, entries, d).

    With `map_` (d, d) the rows that are looked for are mapped first; the table is so already.
    """

    def __init__(self, table: Tensor, map_: Tensor | None = None) -> None:
        self._views = table.float() if table.ndim == 3 else table.float()[None]
        self._squares = (self._views * self._views).sum(2)
        self._map = map_
        self.entries = self._views.shape[1]

    def distances(self, rows: Tensor) -> Tensor:
        """(rows, entries) squared distances to the nearest view, less the rows' own squares, which order nothing."""
        mapped = rows.float() if self._map is None else rows.float() @ self._map
        views = [squares - 2 * mapped @ view.T for view, squares in zip(self._views, self._squares, strict=True)]
        return torch.stack(views).amin(0)

    def top(self, rows: Tensor, count: int) -> Tensor:
        """(rows, count) nearest entries, best first."""
        count = min(count, self.entries)
        return torch.cat([self.distances(block).topk(count, largest=False).indices for block in rows.split(BLOCK)])


def classes_of(public: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(the distinct tokens of the public text, every one of its tokens as a place among them)."""
    return torch.unique(torch.cat(list(public)), return_inverse=True)


def whitening(residuals: Tensor, ridge: float = 1e-4) -> tuple[Tensor, Tensor]:
    """(mean (d,), a symmetric map (d, d) after which residuals have unit covariance, or less where they hardly vary)."""
    wide = residuals.double()
    mean = wide.mean(0)
    covariance = (wide - mean).T @ (wide - mean) / max(1, len(wide) - 1)
    values, vectors = torch.linalg.eigh(covariance)
    floor = ridge * values.clamp(min=0).mean() + 1e-12
    return mean.float(), (vectors @ torch.diag((values.clamp(min=0) + floor).rsqrt()) @ vectors.T).float()
