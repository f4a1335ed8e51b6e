"""What the language-model tasks share: losses a row, loss per token and perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

EXP_LIMIT = 700.0  # exp of more is no float


def predicted_losses(losses: Tensor, places: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """The summed loss and the number of learned tokens of each row; `places` are flat positions in labels (batch, time)."""
    rows = places // labels.shape[1]
    sums = torch.zeros(len(labels), dtype=torch.float64, device=losses.device).index_add_(0, rows, losses.double())
    counts = torch.bincount(rows, minlength=len(labels))
    return [{"loss": total, "tokens": count} for total, count in zip(sums.tolist(), counts.tolist(), strict=True)]


def by_rows(values: Tensor, places: Tensor, labels: Tensor) -> Tensor:
    """The sum of each row's values, (batch,); `places` (n,) are their flat positions in labels (batch, time)."""
    return values.new_zeros(len(labels)).index_add_(0, places // labels.shape[1], values)


def language_measures(predictions: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Losses and tokens of rows."""
    return {name: np.array([each[name] for each in predictions]) for name in ("loss", "tokens")}


def language_figures(arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Loss per token in nats, and perplexity, its exponential."""
    tokens = float(arrays["tokens"].sum())
    loss = float(arrays["loss"].sum()) / tokens if tokens else math.nan
    return {"loss": loss, "perplexity": math.exp(min(loss, EXP_LIMIT)) if loss == loss else math.nan}


def language_shown(prediction: Mapping[str, Any]) -> str:
    """The loss per token of a row."""
    return f"loss {prediction['loss'] / max(1, prediction['tokens']):.3f}"
