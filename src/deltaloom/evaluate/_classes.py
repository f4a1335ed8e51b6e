"""What the classification tasks share: labels from rows, weighted loss, predictions, metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deltaloom.data.labels import LabelMap, balanced_weights, check_known, counts
from deltaloom.data.rows import Row
from deltaloom.data.settings import DataSettings
from deltaloom.errors import DataError, RefusedError
from deltaloom.evaluate.base import Targets
from deltaloom.evaluate.metrics import accuracy, class_table, macro_f1


def class_targets(settings: DataSettings, train: Sequence[Row], evaluation: Sequence[Row], known: LabelMap | None) -> Targets:
    """Labels of the training rows, or those known, and weights if the settings want them."""
    labels = known or LabelMap.of(counts(train))
    if known is not None:
        check_known(train, labels, "the trained model")
    if len(labels) < 2:
        raise DataError("all training rows have the same label", got=labels.names[0], hint="A classifier needs two or more.")
    check_known(evaluation, labels, "the training rows" if known is None else "the trained model")
    return Targets(labels, balanced_weights(train, labels) if settings.class_weights == "balanced" and train else None)


def class_losses(logits: Tensor, labels: Tensor | None, weights: tuple[float, ...] | None) -> tuple[Tensor, Tensor]:
    """(weighted cross-entropies (n,), their weights (n,)) of logits (n, classes) and labels (n,)."""
    if labels is None:
        raise RefusedError("these rows have no label to learn from")
    if weights is None:
        return F.cross_entropy(logits.float(), labels, reduction="none"), torch.ones(len(labels), device=logits.device)
    weight = torch.tensor(weights, device=logits.device)
    return F.cross_entropy(logits.float(), labels, weight=weight, reduction="none"), weight[labels]


def class_loss(logits: Tensor, labels: Tensor | None, weights: tuple[float, ...] | None) -> tuple[Tensor, Tensor]:
    """(sum of weighted cross-entropies, sum of the weights)."""
    losses, own = class_losses(logits, labels, weights)
    return losses.sum(), own.sum()


def class_predictions(logits: Tensor, labels: LabelMap, truth: Tensor | None) -> list[dict[str, Any]]:
    """Label, probabilities and, where the truth is known, loss of each row."""
    logs = logits.float().log_softmax(-1)
    found: list[dict[str, Any]] = [
        {"label": labels.names[max(range(len(row)), key=row.__getitem__)],
         "probabilities": dict(zip(labels.names, row, strict=True))} for row in logs.exp().tolist()]
    if truth is not None:
        for prediction, loss in zip(found, (-logs.gather(1, truth[:, None])).squeeze(1).tolist(), strict=True):
            prediction["loss"] = loss
    return found


def class_measures(predictions: Sequence[Mapping[str, Any]], rows: Sequence[Row], labels: LabelMap) -> dict[str, np.ndarray]:
    """True class, guessed class and loss of each row."""
    return {"truth": np.array(labels.indices(row.target for row in rows)),
            "guess": np.array(labels.indices(each["label"] for each in predictions)),
            "loss": np.array([each["loss"] for each in predictions])}


def class_figures(arrays: Mapping[str, np.ndarray], classes: int) -> dict[str, float]:
    """Accuracy, macro F1 over the classes that occur, and mean unweighted cross-entropy."""
    truth, guess = arrays["truth"], arrays["guess"]
    return {"accuracy": accuracy(truth, guess), "macro_f1": macro_f1(truth, guess, classes), "loss": float(arrays["loss"].mean())}


def class_tables(predictions: Sequence[Mapping[str, Any]], rows: Sequence[Row],
                 labels: LabelMap) -> dict[str, list[dict[str, Any]]]:
    """Precision, recall, F1 and support by class."""
    arrays = class_measures(predictions, rows, labels)
    return {"classes": class_table(arrays["truth"], arrays["guess"], labels.names)}
