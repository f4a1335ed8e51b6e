"""What prompts share: tokens that initial values are taken from, and models that cannot read behind rows of embeddings."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaloom.errors import RefusedError, SettingsError
from deltaloom.sites import input_layer


def text_tokens(tokenizer: Any, text: str, length: int) -> Tensor:
    """The first `length` tokens of a text without special tokens, (length,); a shorter text begins again.

    Raises:
        SettingsError: there is no tokenizer, or the text has no tokens.
    """
    if tokenizer is None:
        raise SettingsError("init: text needs the model's tokenizer",
                            hint="Give it: attach(model, methods, tokenizer=tokenizer).")
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise SettingsError("the text of init: text has no tokens", got=text)
    return torch.tensor([ids[index % len(ids)] for index in range(length)])


def vocabulary_tokens(model: nn.Module, tokenizer: Any, length: int, generator: torch.Generator) -> Tensor:
    """Randomly chosen tokens, (length,); not special ones, where a tokenizer says which these are.

    Raises:
        RefusedError: the model has no tokens.
    """
    table = input_layer(model)
    if not isinstance(table, nn.Embedding):
        raise RefusedError("init: vocabulary needs a model with token embeddings", got=type(model).__name__, legal="init: random")
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    known = torch.tensor([token for token in range(table.num_embeddings) if token not in special])
    return known[torch.randint(len(known), (length,), generator=generator)]


def check_reads_embeddings(model: nn.Module) -> None:
    """Refuse classifiers on decoders: given ids they look for the last token that is no pad, given embeddings for the last row.

    Raises:
        RefusedError: the model is one.
    """
    if isinstance(model, PreTrainedModel) and "last_non_pad_token" in inspect.getsource(type(model).forward):
        raise RefusedError("This classifier finds the last token by its ids, and with a prompt there are embeddings only",
                           got=type(model).__name__, hint="Use prefix tuning, or an encoder such as BERT.")
