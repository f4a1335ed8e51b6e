"""Token classification: one tag for each word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from deltaloom.data.batches import Batch, collate
from deltaloom.data.encode import IGNORED, Example, encode_words
from deltaloom.data.labels import LabelMap
from deltaloom.data.rows import Row, TokensRow
from deltaloom.data.settings import DataSettings
from deltaloom.evaluate._classes import class_losses, class_targets
from deltaloom.evaluate._language import by_rows
from deltaloom.evaluate.base import Arrays, Prediction, Targets, Task
from deltaloom.evaluate.metrics import entities, f1_of, is_bio, ratio


class TokenClassification(Task):
    """Accuracy over words; with BIO tags also precision, recall and F1 of entities."""

    name: ClassVar[str] = "token-classification"
    formats: ClassVar[tuple[str, ...]] = ("tokens",)
    primary: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    @classmethod
    def prepare(cls, settings: DataSettings, train: Sequence[Row], evaluation: Sequence[Row] = (),
                known: LabelMap | None = None) -> Targets:
        """Tags, sorted, and their weights."""
        return class_targets(settings, train, evaluation, known)

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Token ids, and each word's tag at its first token."""
        return encode_words(rows, self.tokenizer, self.max_length, self.labels)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Padded ids with masks."""
        return collate(examples, self.pad_id, "tags")

    def row_losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(each row's sum over words, each times the weight of its tag; the sums of these weights)."""
        logits = model(**batch.inputs).logits
        if batch.labels is None:
            return class_losses(logits, None, None)
        places = (batch.labels.flatten() != IGNORED).nonzero().squeeze(1)
        losses, weights = class_losses(logits.flatten(0, 1)[places], batch.labels.flatten()[places], self.targets.weights)
        return by_rows(losses, places, batch.labels), by_rows(weights, places, batch.labels)

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """A tag for each word, None for words that were cut; with the summed loss and number of words where tags are known."""
        logs = model(**batch.inputs).logits.float().log_softmax(-1)
        best = logs.argmax(-1).tolist()
        found: list[Prediction] = [
            {"tags": [None if place is None else self.labels.names[guesses[place]] for place in example.words or ()]}
            for example, guesses in zip(batch.examples, best, strict=True)]
        if batch.labels is not None:
            own = logs.gather(-1, batch.labels.clamp(min=0)[..., None]).squeeze(-1) * (batch.labels != IGNORED)
            counts = (batch.labels != IGNORED).sum(1).tolist()
            for prediction, loss, count in zip(found, (-own.sum(1)).tolist(), counts, strict=True):
                prediction.update(loss=loss, words=count)
        return found

    def measures(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> Arrays:
        """Counts of each row: right words, words, entities found rightly, guessed and there; loss and its words."""
        columns: dict[str, list[float]] = {name: [] for name in ("right", "words", "hits", "guessed", "actual", "loss", "scored")}
        for prediction, truth in zip(predictions, map(_tags, rows), strict=True):
            tags = prediction["tags"]
            guessed, actual = entities(tags), entities(truth)
            values = (sum(tag == other for tag, other in zip(tags, truth, strict=True)), len(truth), len(guessed & actual),
                      len(guessed), len(actual), prediction["loss"], prediction["words"])
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
        return {name: np.array(column) for name, column in columns.items()}

    def figures(self, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Accuracy over words (a word that was cut is wrong), loss per word; for BIO tags also entities, exact matches."""
        total = {name: float(array.sum()) for name, array in arrays.items()}
        found = {"accuracy": ratio(total["right"], total["words"]), "loss": ratio(total["loss"], total["scored"])}
        if is_bio(self.labels.names):
            found.update(entity_precision=ratio(total["hits"], total["guessed"]),
                         entity_recall=ratio(total["hits"], total["actual"]),
                         entity_f1=f1_of(total["hits"], total["guessed"], total["actual"]))
        return found

    def tables(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
        """Precision, recall, F1 and support by type of entity, or by tag where tags mark no entities."""
        marks = entities if is_bio(self.labels.names) else _places
        hits: Counter[str] = Counter()
        guessed: Counter[str] = Counter()
        actual: Counter[str] = Counter()
        for prediction, row in zip(predictions, rows, strict=True):
            guesses, truths = marks(prediction["tags"]), marks(_tags(row))
            hits.update(kind for kind, *_ in guesses & truths)
            guessed.update(kind for kind, *_ in guesses)
            actual.update(kind for kind, *_ in truths)
        return {"classes": [{"class": kind, "precision": ratio(hits[kind], guessed[kind]),
                             "recall": ratio(hits[kind], actual[kind]), "f1": f1_of(hits[kind], guessed[kind], actual[kind]),
                             "support": actual[kind]}
                            for kind in sorted(set(guessed) | set(actual))]}

    def shown(self, prediction: Prediction) -> str:
        """The tags, ? for words that were cut."""
        return " ".join(tag or "?" for tag in prediction["tags"])


def _tags(row: Row) -> tuple[str, ...]:
    return row.tags or () if isinstance(row, TokensRow) else ()


def _places(tags: Sequence[str | None]) -> set[tuple[str, int, int]]:
    """Each tag as an entity of one word."""
    return {(tag, place, place + 1) for place, tag in enumerate(tags) if tag is not None}
