"""Sequence classification: one label for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from deltaloom.data.batches import Batch, collate
from deltaloom.data.encode import Example, encode_texts
from deltaloom.data.labels import LabelMap
from deltaloom.data.rows import Row
from deltaloom.data.settings import DataSettings
from deltaloom.evaluate._classes import (
    class_figures,
    class_losses,
    class_measures,
    class_predictions,
    class_tables,
    class_targets,
)
from deltaloom.evaluate.base import Arrays, Prediction, Targets, Task


class SequenceClassification(Task):
    """Accuracy of the likeliest label."""

    name: ClassVar[str] = "sequence-classification"
    formats: ClassVar[tuple[str, ...]] = ("text-label",)
    primary: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    @classmethod
    def prepare(cls, settings: DataSettings, train: Sequence[Row], evaluation: Sequence[Row] = (),
                known: LabelMap | None = None) -> Targets:
        """Label names, sorted, and weights of classes."""
        return class_targets(settings, train, evaluation, known)

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Token ids and the number of the label."""
        return encode_texts(rows, self.tokenizer, self.max_length, self.labels)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Padded ids with masks."""
        return collate(examples, self.pad_id, "class")

    def row_losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(each row's loss times the weight of its class; these weights)."""
        return class_losses(model(**batch.inputs).logits, batch.labels, self.targets.weights)

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Label and probabilities."""
        return class_predictions(model(**batch.inputs).logits, self.labels, batch.labels)

    def measures(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> Arrays:
        """Truth, guess and loss."""
        return class_measures(predictions, rows, self.labels)

    def figures(self, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Accuracy, macro F1, loss."""
        return class_figures(arrays, len(self.labels))

    def tables(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
        """Metrics by class."""
        return class_tables(predictions, rows, self.labels)

    def shown(self, prediction: Prediction) -> str:
        """The label."""
        return str(prediction["label"])
