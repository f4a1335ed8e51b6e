"""Soft prompts at the input of a tuned model: rows in front of the embeddings, and off the logits again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaloom.architectures import NOT_BY_ROW
from deltaloom.errors import RefusedError
from deltaloom.sites import input_layer
from deltaloom.tuned.routing import Routing


def insert_prompt(model: nn.Module, inputs: dict[str, Any], prompts: dict[str, Tensor],
                  routing: Routing) -> tuple[dict[str, Any], int]:
    """The model's inputs with each row's prompt in front, and the number of rows put there (the longest prompt).

    `prompts` holds (length, d_model) for each lane, or (batch, length, d_model). Shorter prompts and rows without one are
    padded in front and masked.
    """
    inputs = dict(inputs)
    embeds = inputs.pop("inputs_embeds", None)
    if embeds is None:
        embeds = input_layer(model)(inputs.pop("input_ids"))  # type: ignore[misc]
    batch = embeds.shape[0]
    groups = routing.groups(batch)
    length = max(prompts[lane].shape[-2] for lane, _ in groups if lane in prompts)
    front = embeds.new_zeros(batch, length, embeds.shape[-1])
    seen = torch.zeros(batch, length, dtype=torch.long, device=embeds.device)
    for lane, rows in groups:
        if lane not in prompts:
            continue
        block = prompts[lane].to(embeds.dtype)
        where = slice(None) if rows is None else rows
        count = batch if rows is None else len(rows)
        block = block[where] if block.ndim == 3 else block
        front[where] = nn.functional.pad(block, (0, 0, length - block.shape[-2], 0)).expand(count, -1, -1)
        seen[where, length - block.shape[-2]:] = 1
    inputs["inputs_embeds"] = torch.cat((front, embeds), 1)
    _place(model, inputs, embeds.shape[1], seen)
    mask = inputs.get("attention_mask")
    if mask is not None or not bool(seen.all()):
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
        inputs["attention_mask"] = torch.cat((seen.to(mask.dtype), mask), 1)
    if inputs.get("token_type_ids") is not None:
        types = inputs["token_type_ids"]
        inputs["token_type_ids"] = torch.cat((types.new_zeros(batch, length), types), 1)
    if inputs.get("labels") is not None and inputs["labels"].ndim == 2 and not _has_encoder(model):
        inputs["labels"] = torch.cat((inputs["labels"].new_full((batch, length), -100), inputs["labels"]), 1)
    return inputs, length


def _place(model: nn.Module, inputs: dict[str, Any], time: int, seen: Tensor) -> None:
    """Give the text behind each row's prompt the positions that it has when all rows have this prompt.

    Raises:
        RefusedError: prompts differ row by row in a model that takes positions from places, or reads its first place.
    """
    given = inputs.get("position_ids")
    if given is None and bool(seen.all()):
        return
    if given is None and _has_encoder(model) and any(name.endswith(NOT_BY_ROW) for name, _ in model.named_modules()):
        return  # relative positions: pads in front move nothing
    if _has_encoder(model) or not (isinstance(model, PreTrainedModel) and model.can_generate()):
        raise RefusedError("prompts row by row, or with positions given, are for causal models", got=type(model).__name__,
                           hint="Use one prompt for the whole batch.")
    text = torch.arange(time, device=seen.device)[None] if given is None else given
    front = (seen.cumsum(1) - 1).clamp_min(0)
    inputs["position_ids"] = torch.cat((front, text + seen.sum(1, keepdim=True)), 1)


def strip_prompt(output: Any, length: int, model: nn.Module) -> Any:
    """The model's output with the prompt's rows taken off token-level logits."""
    logits = output.get("logits") if isinstance(output, dict) else None
    if logits is not None and logits.ndim == 3 and not _has_encoder(model):
        output["logits"] = logits[:, length:]
    return output


def _has_encoder(model: nn.Module) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))
