"""The fingerprint of a frozen backbone: which base a delta belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deltaloom.compact.face import compact_layers
from deltaloom.errors import RefusedError

SAMPLE = 4096  # values of one parameter that are hashed; enough to tell models apart, and a 7B model takes seconds


Sample = tuple[tuple[int, ...], bytes]  # shape and sampled values of a parameter


def fingerprint(model: nn.Module, samples: Mapping[str, Sample] | None = None) -> str:
    """The sha256, in hex, of a model's backbone: names, shapes and a sample of the values of every parameter.

    The same for a load in fp32 or bf16 (values are rounded to bf16) and for every task: heads and poolers, which differ by
    task, are left out. Computed before anything is attached or merged. At most 4096 values a parameter, evenly spread, are read:
    a change of any other value is not seen.

    A model that was quantised while it was read has the fingerprint of its dense weights: `samples` holds those of the layers
    that are compact by now, by the names of their weights, or the configuration records the result. Any other compact model has
    one of its own, of what its layers store.

    Raises:
        RefusedError: the model's weights were not loaded (meta device).
    """
    known = getattr(getattr(getattr(model, "config", None), "quantization_config", None), "fingerprint", None)
    compact = compact_layers(model)
    if known and samples is None and compact:
        return str(known)
    prefix = backbone_prefix(model)
    found: dict[str, Sample] = {name.removeprefix(prefix): sample for name, sample in (samples or {}).items()}
    stored = {f"{path}.{name}": buffer for path, layer in compact.items() if f"{path}.weight" not in (samples or {})
              for name, buffer in layer.named_buffers(recurse=False)}
    own = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    for name, parameter in (*backbone_parameters(model), *own.items()):
        if parameter.is_meta:
            raise RefusedError("a model without loaded weights has no fingerprint", got=name)
        found[name] = (tuple(parameter.shape), sample_of(parameter))
    digest = hashlib.sha256()
    for name, (shape, values) in sorted(found.items()):
        digest.update(f"{name} {shape}\n".encode())
        digest.update(values)
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """The sha256, in hex, of what decides a text's tokens: vocabulary, rules, special tokens; not how rows are padded or cut."""
    facts: dict[str, Any] = {"vocabulary": sorted(tokenizer.get_vocab().items()), "special": sorted(tokenizer.all_special_tokens)}
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        facts["rules"] = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def sample_of(tensor: Tensor) -> bytes:
    """The values of a tensor that the fingerprint reads, rounded to bfloat16."""
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].to("cpu", torch.bfloat16)
    return sample.contiguous().view(torch.int16).numpy().tobytes()


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
