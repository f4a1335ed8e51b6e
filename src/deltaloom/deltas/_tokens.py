"""Tokens that initial values are taken from: those of a text, or randomly chosen ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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
