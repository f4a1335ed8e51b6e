"""Sequence to sequence: an encoder reads the prompt, a decoder learns to write the completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaloom.data.batches import Batch, collate
from deltaloom.data.encode import IGNORED, Example, encode_seq2seq
from deltaloom.data.rows import Row
from deltaloom.errors import RefusedError
from deltaloom.evaluate._language import by_rows, language_figures, language_measures, language_shown, predicted_losses
from deltaloom.evaluate.base import Arrays, Prediction, Task


class Seq2SeqLM(Task):
    """Loss per token in nats on the completion."""

    name: ClassVar[str] = "seq2seq-lm"
    formats: ClassVar[tuple[str, ...]] = ("prompt-completion", "alpaca")
    primary: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    generates: ClassVar[bool] = True

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Token ids of the encoder's and the decoder's side."""
        return encode_seq2seq(rows, self.tokenizer, self.max_length)

    def prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        """The encoder's inputs."""
        texts = [row.source for row in rows]
        return [list(ids) for ids in self.tokenizer(texts, truncation=True, max_length=self.max_length).input_ids]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Both sides padded on the right; the decoder reads its labels moved by one."""
        return collate(examples, self.pad_id, "seq2seq", self.config.decoder_start_token_id)

    def row_losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum over the completion's tokens, their number)."""
        losses, places, labels = _losses(model, batch)
        return by_rows(losses, places, labels), by_rows(torch.ones_like(losses), places, labels)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float | Tensor]:
        """(sum over the completion's tokens in one go, to the bit that of a loss computed elsewhere; their number)."""
        losses, places, _ = _losses(model, batch)
        return losses.sum(), len(places)

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Summed loss and tokens of each row's completion."""
        return predicted_losses(*_losses(model, batch))

    def measures(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> Arrays:
        """Losses and tokens."""
        return language_measures(predictions)

    def figures(self, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Loss per token and perplexity."""
        return language_figures(arrays)

    def shown(self, prediction: Prediction) -> str:
        """The loss per token."""
        return language_shown(prediction)


def _losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(losses (n,), their flat positions (n,), labels (batch, time)); the decoder's inputs are moved already."""
    if batch.labels is None:
        raise RefusedError("these rows have no completion to score")
    places = (batch.labels.flatten() != IGNORED).nonzero().squeeze(1)
    scores = model(**batch.inputs, use_cache=False).logits.flatten(0, 1)[places]
    return F.cross_entropy(scores.float(), batch.labels.flatten()[places], reduction="none"), places, batch.labels
