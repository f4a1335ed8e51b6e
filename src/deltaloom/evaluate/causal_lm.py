"""Causal language modelling: a decoder learns to write completions, assistant turns or whole texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from deltaloom.architectures import FAMILIES
from deltaloom.data.batches import Batch, collate, learned_places, pack
from deltaloom.data.encode import Example, encode_causal, encode_prompts
from deltaloom.data.rows import Row
from deltaloom.errors import RefusedError
from deltaloom.evaluate._language import by_rows, language_figures, language_measures, language_shown, predicted_losses
from deltaloom.evaluate.base import Arrays, Prediction, Task
from deltaloom.kernels.cross_entropy import token_losses
from deltaloom.tuned import Tuned


class CausalLM(Task):
    """Loss per token in nats on the learned tokens."""

    name: ClassVar[str] = "causal-lm"
    formats: ClassVar[tuple[str, ...]] = ("prompt-completion", "messages", "alpaca", "sharegpt", "text")
    primary: ClassVar[str] = "loss"
    higher_is_better: ClassVar[bool] = False
    generates: ClassVar[bool] = True

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Token ids with the learned ones marked."""
        return encode_causal(rows, self.tokenizer, self.max_length)

    def prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        """The unlearned start of each row."""
        return encode_prompts(rows, self.tokenizer)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Right-padded ids without a mask."""
        return collate(examples, self.pad_id, "causal")

    def pack(self, examples: Sequence[Example]) -> Batch:
        """One row without padding."""
        return pack(examples)

    def row_losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """(sum over the learned tokens, their number)."""
        losses, places, labels = causal_losses(model, batch)
        return by_rows(losses, places, labels), by_rows(torch.ones_like(losses), places, labels)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float | Tensor]:
        """(sum over the learned tokens in one go, to the bit that of a loss computed elsewhere; their number)."""
        losses, places, _ = causal_losses(model, batch)
        return losses.sum(), len(places)

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Summed loss and learned tokens of each row."""
        return predicted_losses(*causal_losses(model, batch))

    def measures(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> Arrays:
        """Losses and tokens."""
        return language_measures(predictions)

    def figures(self, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Loss per token and perplexity."""
        return language_figures(arrays)

    def shown(self, prediction: Prediction) -> str:
        """The loss per token."""
        return language_shown(prediction)


class PlaceLosses(nn.Module, ABC):
    """A model that computes the losses at places itself, because its head is elsewhere."""

    @abstractmethod
    def place_losses(self, batch: Batch, places: Tensor, wanted: Tensor) -> Tensor:
        """Losses (n,) in nats at flat places (n,) of the batch's (rows, time); `wanted` (n,) are the tokens there."""


def causal_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(losses (n,), the flat positions (n,) whose next token is learned, labels (batch, time)).

    Where the model allows it the head runs at these positions alone, and no logits are kept.
    """
    labels = batch.labels
    if labels is None:
        raise RefusedError("these rows have no completion to score")
    places = learned_places(labels) if batch.places is None else batch.places
    wanted = labels.flatten()[places + 1]
    if isinstance(model, PlaceLosses):
        return model.place_losses(batch, places, wanted), places, labels
    packed = batch.inputs.get("segments")
    with model.routing.layout.reading(labels, packed and packed.lengths) if isinstance(model, Tuned) else nullcontext():
        return _losses_at(model, batch, places, wanted), places, labels


def _losses_at(model: nn.Module, batch: Batch, places: Tensor, wanted: Tensor) -> Tensor:
    if has_plain_head(model):
        hidden, head = hidden_and_head(model, batch.inputs)
        chosen = hidden.flatten(0, 1)[places]
        # an exact type and not isinstance: a wrapper or a subclass may compute something else
        if type(head) is nn.Linear:
            return token_losses(chosen, head.weight, head.bias, wanted)
        lanes = model.routing.lanes if isinstance(model, Tuned) else None
        if isinstance(model, Tuned) and isinstance(lanes, tuple):  # the head's rows are the places
            with model.use([lanes[row] for row in (places // hidden.shape[1]).tolist()]):
                scores = head(chosen)
        else:
            scores = head(chosen)
    else:
        scores = model(**batch.inputs, use_cache=False).logits.flatten(0, 1)[places]
    return F.cross_entropy(scores.float(), wanted, reduction="none")


def has_plain_head(model: nn.Module) -> bool:
    """Whether the logits are head(last hidden state) and nothing more, by the table of architectures."""
    bare = model.model if isinstance(model, Tuned) else model
    if not isinstance(bare, PreTrainedModel):
        return False
    family = FAMILIES.get(bare.config.model_type)
    return family is not None and family.plain_head and bare.get_output_embeddings() is not None


def hidden_and_head(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, nn.Module]:
    """(last hidden states (batch, time, d_model), head) of a model with a plain head."""
    if isinstance(model, Tuned):
        return model.hidden(**inputs, use_cache=False)
    if not isinstance(model, PreTrainedModel):
        raise RefusedError(f"{type(model).__name__} is no transformers model, so it has no head apart")
    return model.get_decoder()(**inputs, use_cache=False).last_hidden_state, model.get_output_embeddings()


