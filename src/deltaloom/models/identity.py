"""The fingerprint of a frozen backbone: which base a delta belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deltaloom.errors import RefusedError

SAMPLE = 4096  # values of one parameter that are hashed; enough to tell models apart, and a 7B model takes seconds


def fingerprint(model: nn.Module) -> str:
    """The sha256, in hex, of a model's backbone: names, shapes and a sample of the values of every parameter.

    The same for a load in fp32 or bf16 (values are rounded to bf16) and for every task: heads and poolers, which differ by
    task, are left out. Computed before anything is attached, merged or quantised. At most 4096 values a parameter, evenly
    spread, are read: a change of any other value is not seen.

    Raises:
        RefusedError: the model's weights were not loaded (meta device).
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(backbone_parameters(model)):
        if parameter.is_meta:
            raise RefusedError("a model without loaded weights has no fingerprint", got=name)
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].to("cpu", torch.bfloat16)
        digest.update(sample.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """The sha256, in hex, of what decides a text's tokens: vocabulary, rules, special tokens; not how rows are padded or cut."""
    facts: dict[str, Any] = {"vocabulary": sorted(tokenizer.get_vocab().items()), "special": sorted(tokenizer.all_special_tokens)}
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        facts["rules"] = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def backbone_prefix(model: nn.Module) -> str:
    """The name, with its dot, under which a transformers model holds its backbone; empty if the model is one itself."""
    prefix = model.base_model_prefix if isinstance(model, PreTrainedModel) else ""
    return f"{prefix}." if prefix and prefix in dict(model.named_children()) else ""


def backbone_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The backbone's parameters, named relative to it, without head and pooler."""
    prefix = backbone_prefix(model)
    head = {id(parameter) for parameter in _output_parameters(model)}
    for name, parameter in model.named_parameters():
        own = name.removeprefix(prefix)
        if name.startswith(prefix) and id(parameter) not in head and not own.startswith("pooler."):
            yield own, parameter


def _output_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The output embeddings of a language model that are not tied to its input embeddings (T5 has no prefix to tell them by)."""
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if output is None or not isinstance(model, PreTrainedModel):
        return []
    tied = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    return [parameter for parameter in output.parameters() if id(parameter) not in tied]
