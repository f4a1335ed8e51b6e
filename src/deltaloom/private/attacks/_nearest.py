"""Nearest rows of a table, in blocks; and which tokens a text shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 512  # rows at once: 512 x 50,000 distances are 100 MB


class Nearest:
    """Euclidean search over a table (entries, d), or over several views of the entries (views, entries, d)."""

    def __init__(self, table: Tensor) -> None:
        self._views = table.float() if table.ndim == 3 else table.float()[None]
        self._squares = (self._views * self._views).sum(2)
        self.entries = self._views.shape[1]

    def distances(self, rows: Tensor) -> Tensor:
        """(rows, entries) squared distances to the nearest view, less the rows' own squares, which order nothing."""
        views = [squares - 2 * rows.float() @ view.T for view, squares in zip(self._views, self._squares, strict=True)]
        return torch.stack(views).amin(0)

    def top(self, rows: Tensor, count: int) -> Tensor:
        """(rows, count) nearest entries, best first."""
        count = min(count, self.entries)
        return torch.cat([self.distances(block).topk(count, largest=False).indices for block in rows.split(BLOCK)])


def classes_of(public: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(the distinct tokens of the public text, every one of its tokens as a place among them)."""
    return torch.unique(torch.cat(list(public)), return_inverse=True)
