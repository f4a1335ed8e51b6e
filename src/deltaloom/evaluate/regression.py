"""Regression: one number for a text or a pair of texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from deltaloom.data.batches import Batch, collate
from deltaloom.data.encode import Example, encode_texts
from deltaloom.data.rows import Row
from deltaloom.errors import RefusedError
from deltaloom.evaluate.base import Arrays, Prediction, Task
from deltaloom.evaluate.metrics import pearson, spearman


class Regression(Task):
    """Squared error of a number; judged by its correlation with the truth."""

    name: ClassVar[str] = "regression"
    formats: ClassVar[tuple[str, ...]] = ("text-label",)
    primary: ClassVar[str] = "pearson"
    higher_is_better: ClassVar[bool] = True
    numbers: ClassVar[bool] = True

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Token ids and the number."""
        return encode_texts(rows, self.tokenizer, self.max_length, None)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Padded ids with masks."""
        return collate(examples, self.pad_id, "number")

    def row_losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(squared errors, ones)."""
        if batch.labels is None:
            raise RefusedError("these rows have no number to learn from")
        errors = _values(model, batch) - batch.labels
        return errors * errors, torch.ones_like(errors)

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """The number."""
        return [{"value": value} for value in _values(model, batch).tolist()]

    def measures(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> Arrays:
        """Truth and guess."""
        return {"truth": np.array([float(row.target) for row in rows]),
                "guess": np.array([each["value"] for each in predictions])}

    def figures(self, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Correlations, errors, and the mean squared error as loss."""
        truth, guess = arrays["truth"], arrays["guess"]
        loss = float(((truth - guess) ** 2).mean())
        return {"pearson": pearson(truth, guess), "spearman": spearman(truth, guess), "rmse": math.sqrt(loss),
                "mae": float(np.abs(truth - guess).mean()), "loss": loss}

    def shown(self, prediction: Prediction) -> str:
        """The number."""
        return f"{prediction['value']:.3f}"


def _values(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch.inputs).logits.squeeze(-1).float()
