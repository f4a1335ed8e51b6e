"""Running halves: what the front computes, and what the back makes of the rows that crossed the cut.

The back runs the rows in the layout in which the front ran them, so that every product has the unsplit model's shape.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from deltaloom.attention import Segments
from deltaloom.private.messages import Layout


def run_front(model: PreTrainedModel, inputs: Mapping[str, Any], is_decoder: bool) -> Tensor:
    """The last hidden state of a front (or of a whole model), (batch, time, d_model)."""
    plain = {"use_cache": False} if is_decoder else {}
    return model.base_model(**inputs, **plain).last_hidden_state


def run_back(model: PreTrainedModel, hidden: Tensor, lengths: Sequence[int], offsets: Sequence[int], layout: Layout,
             is_decoder: bool) -> Tensor:
    """Hidden states at the cut (tokens, d_model) -> last ones: (1, tokens, d_model) if packed, else (rows, longest, d_model).

    Differentiable in `hidden`.
    """
    plain: dict[str, Any] = {"use_cache": False} if is_decoder else {}
    if layout == "packed":
        places = torch.cat([torch.arange(start, start + length) for start, length in zip(offsets, lengths, strict=True)])
        plain |= {"position_ids": places[None].to(hidden.device), "segments": Segments(tuple(lengths))}
        return model.base_model(inputs_embeds=hidden[None], **plain).last_hidden_state
    mask = row_mask(lengths, hidden.device)
    if layout == "masked":
        plain["attention_mask"] = mask.long()
    return model.base_model(inputs_embeds=unpacked(hidden, mask), **plain).last_hidden_state


def row_mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    """bool (rows, longest), True at real tokens of right-padded rows."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]


def unpacked(flat: Tensor, mask: Tensor) -> Tensor:
    """(tokens, width) -> (rows, longest, width), zero where there is padding."""
    return flat.new_zeros(*mask.shape, flat.shape[-1]).masked_scatter(mask[..., None], flat)


def packed(hidden: Tensor, layout: Layout, lengths: Sequence[int]) -> Tensor:
    """The inverse: (1, tokens, width) or (rows, longest, width) -> (tokens, width)."""
    return hidden[0] if layout == "packed" else hidden[row_mask(lengths, hidden.device)]


class Answer(nn.Module):
    """Stands for a backbone whose last hidden states are known."""

    def __init__(self, hidden: Tensor, pooler: nn.Module | None) -> None:
        super().__init__()
        self.hidden = hidden
        self.pooler = pooler

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """These states, and what the pooler makes of them."""
        pooled = None if self.pooler is None else self.pooler(self.hidden)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=self.hidden, pooler_output=pooled)


def class_logits(model: PreTrainedModel, hidden: Tensor, scored: Tensor) -> Tensor:
    """What a classifier's own head makes of last hidden states (rows, time, d_model) at one place of each row, (rows, classes).

    `scored` (rows,) are these places: the first ones for encoders, the last real token for decoders. The class's own forward
    runs, around a backbone that answers with these states; values at other places do not matter.
    """
    pad = model.config.get_text_config().pad_token_id
    if pad is None:  # then transformers reads the last place
        hidden, pad = torch.cat([row[None, :int(place) + 1] for row, place in zip(hidden, scored, strict=True)]), -1
    backbone = model.base_model_prefix
    around = copy.copy(model)
    pooler = dict(model.base_model.named_children()).get("pooler")
    around.__dict__["_modules"] = {**model._modules, backbone: Answer(hidden, pooler)}
    seen = torch.arange(hidden.shape[1], device=hidden.device) <= scored[:, None]
    ids = torch.where(seen, 1 if pad == 0 else 0, pad)
    return around(input_ids=ids).logits
