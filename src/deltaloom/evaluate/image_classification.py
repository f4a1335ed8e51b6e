"""Image classification: one label for an image; images are opened when their batch is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from deltaloom.data.batches import Batch
from deltaloom.data.encode import Example, encode_images
from deltaloom.data.images import open_image
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


class ImageClassification(Task):
    """Accuracy of the likeliest label."""

    name: ClassVar[str] = "image-classification"
    formats: ClassVar[tuple[str, ...]] = ("image",)
    primary: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    @classmethod
    def prepare(cls, settings: DataSettings, train: Sequence[Row], evaluation: Sequence[Row] = (),
                known: LabelMap | None = None) -> Targets:
        """Label names, sorted, and weights of classes."""
        return class_targets(settings, train, evaluation, known)

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Where each image is, the number of its label, and its patches as length."""
        sizes = self.config.to_dict()
        image, patch = sizes.get("image_size"), sizes.get("patch_size")
        patches = (image // patch) ** 2 + 1 if isinstance(image, int) and isinstance(patch, int) else 1
        return encode_images(rows, self.labels, patches)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pixels as the model's image processor makes them."""
        opened = [open_image(example.image) for example in examples if example.image is not None]
        pixels = self._processor(images=opened, return_tensors="pt")["pixel_values"]
        found = [example.labels for example in examples]
        labels = None if None in found else torch.tensor(found)
        lengths = torch.tensor([example.length for example in examples])
        return Batch({"pixel_values": pixels}, labels, tuple(examples), lengths, int(lengths.sum()))

    def row_losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(each row's loss times the weight of its class; these weights)."""
        return class_losses(self._logits(model, batch), batch.labels, self.targets.weights)

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Label and probabilities."""
        return class_predictions(self._logits(model, batch), self.labels, batch.labels)

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        dtype = next(model.parameters()).dtype  # pixels are fp32, and models of images do not cast them
        return model(pixel_values=batch.inputs["pixel_values"].to(dtype)).logits

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
