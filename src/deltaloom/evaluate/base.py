"""The contract of a task: what it takes, how rows become batches, its loss, its predictions and its metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from deltaloom.data.encode import Example
from deltaloom.data.labels import LabelMap
from deltaloom.data.rows import Row
from deltaloom.data.settings import DataSettings
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.evaluate.metrics import bootstrap
from deltaloom.registry import class_named, names_in

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from deltaloom.data.batches import Batch

SUPPORT = ("base", "metrics")  # files of the folder that are no tasks
MICRO_TOKENS = 4096  # tokens of a batch with padding when only predicting
Prediction = dict[str, Any]
Arrays = dict[str, np.ndarray]
Spread = Callable[[Sequence[Sequence[int]], Callable[[Sequence[int]], list[Prediction]]], list[list[Prediction]]]


@dataclass(frozen=True)
class Targets:
    """What a task learned from the training rows before the model is loaded: label names in order, and their weights."""

    labels: LabelMap | None = None
    weights: tuple[float, ...] | None = None


class Task(ABC):
    """One kind of task, bound to a model's tokenizer or image processor and configuration; it holds no model.

    `model` in the methods is anything called as the models of transformers are: a bare one or a tuned one.
    """

    name: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]  # of rows that it takes, see data.formats
    primary: ClassVar[str]  # the metric by which a run is judged
    higher_is_better: ClassVar[bool]
    numbers: ClassVar[bool] = False  # labels are numbers, not classes
    generates: ClassVar[bool] = False  # the answer is a text that the model writes

    def __init__(self, settings: DataSettings, targets: Targets, config: PreTrainedConfig, *,
                 tokenizer: PreTrainedTokenizerBase | None = None, processor: Any = None) -> None:
        self.settings, self.targets, self.config = settings, targets, config
        self._tokenizer, self._processor = tokenizer, processor

    @classmethod
    def prepare(cls, settings: DataSettings, train: Sequence[Row], evaluation: Sequence[Row] = (),
                known: LabelMap | None = None) -> Targets:
        """The targets of training rows; `known` are the labels of a delta or model that is already trained.

        Raises:
            DataError: an evaluation row has a label that is not known, or there are fewer than two labels.
        """
        return Targets()

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """One example for each row, in order."""

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """Examples as a padded batch."""

    def pack(self, examples: Sequence[Example]) -> Batch:
        """Examples one after another in a single row, each seeing itself only.

        Raises:
            RefusedError: rows of this task are not packed.
        """
        raise RefusedError(f"rows of task {self.name} are not packed", got="train.packing: true",
                           hint="Set train.packing to false: batches of rows of similar length have little padding too.")

    @abstractmethod
    def row_losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(the sum of each row's losses in nats or squared units, what it counts: its tokens, one, or the sum of its weights).

        Both (rows,); packed rows are one. A loss depends on its own row alone.
        """

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float | Tensor]:
        """(sum of the losses, what to divide it by), over all rows.

        The loop divides by the total of an optimizer step, so that micro-batches change nothing.
        """
        losses, counts = self.row_losses(model, batch)
        return losses.sum(), counts.sum()

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """What the model says for each row of the batch, ready for JSON."""

    @abstractmethod
    def measures(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> Arrays:
        """Arrays with one entry for each row, from which `figures` makes the metrics of any selection of rows."""

    @abstractmethod
    def figures(self, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The metrics of rows, from their measures."""

    def tables(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
        """Metrics by class or the like, as named lists of records; none by default."""
        return {}

    def prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        """The token ids that the model writes its answer to, for tasks whose answer is a text.

        Raises:
            RefusedError: the task's answers are not written.
        """
        raise RefusedError(f"the answers of task {self.name} are not texts that a model writes")

    def shown(self, prediction: Prediction) -> str:
        """A prediction as a short text for people."""
        return str(prediction)

    def metrics(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, float]:
        """The metrics of predictions, fractions and losses in nats; empty without rows."""
        return self.figures(self.measures(predictions, rows)) if len(rows) else {}

    def intervals(self, predictions: Sequence[Prediction], rows: Sequence[Row], seed: int = 0) -> dict[str, tuple[float, float]]:
        """95% bootstrap intervals of the metrics over rows."""
        return bootstrap(self.measures(predictions, rows), self.figures, seed=seed) if len(rows) else {}

    def predict_all(self, model: nn.Module, examples: Sequence[Example], micro_tokens: int = MICRO_TOKENS,
                    spread: Spread | None = None) -> list[Prediction]:
        """Predictions for all examples in their order, in evaluation mode, in batches of similar length.

        `spread(batches, work)` does the work on all batches and gives the results in order: here, or in several processes.
        """
        import torch

        from deltaloom.data.batches import micro_batches

        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                def work(indices: Sequence[int]) -> list[Prediction]:
                    return self.predict(model, self.collate([examples[index] for index in indices]).to(device))

                batches = micro_batches(range(len(examples)), [example.length for example in examples], micro_tokens)
                results = spread(batches, work) if spread is not None else [work(batch) for batch in batches]
        finally:
            model.train(was_training)
        found = {index: one for batch, part in zip(batches, results, strict=True) for index, one in zip(batch, part, strict=True)}
        return [found[index] for index in range(len(examples))]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        if self._tokenizer is None:
            raise SettingsError(f"task {self.name} needs a tokenizer, and the model has none")
        return self._tokenizer

    @property
    def labels(self) -> LabelMap:
        """The names of the classes."""
        if self.targets.labels is None:
            raise SettingsError(f"task {self.name} needs labels", hint="Get them with `prepare`.")
        return self.targets.labels

    @property
    def max_length(self) -> int:
        """Tokens an example may have: what the settings say, but no more than the tokenizer and the model's positions allow."""
        return min(self.settings.max_length, self.most_tokens)

    @property
    def most_tokens(self) -> int:
        """Tokens that the tokenizer and the model's positions allow."""
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)  # some models count none
        allowed = self.tokenizer.model_max_length
        return min(allowed, positions) if isinstance(positions, int) and positions > 0 else allowed

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about how the settings meet this model; shown as warnings."""
        if self._tokenizer is None or self.settings.max_length <= self.most_tokens:
            return ()
        return (f"data.max_length {self.settings.max_length} counts as {self.max_length}, the most that the model and its "
                "tokenizer allow",)

    @property
    def pad_id(self) -> int:
        """The id that fills batches up; models ignore it, so any will do where the tokenizer names none."""
        found = self.tokenizer.pad_token_id
        return int(found) if found is not None else 0


def task_names() -> list[str]:
    """The names of all tasks."""
    return names_in(__package__, SUPPORT)


def task_named(name: str) -> type[Task]:
    """The task of that name.

    Raises:
        SettingsError: there is none; names the legal ones and the nearest.
    """
    return class_named(__package__, name, Task, "task", SUPPORT)  # type: ignore[type-abstract]
