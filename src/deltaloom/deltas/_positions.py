"""How positions enter a model's keys: rotated, from a table of embeddings, or not at all; what prefixes need to know.

A prefix has no position of its own: every query scores its keys as they are stored, and the text keeps the positions 0, 1,
... that it has without a prefix. With rotary positions a score depends on the distance alone, so keys taken at positions
-P, ..., -1 are exactly those of P tokens before the text. With a table of positions, these would need the text to begin at P.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaloom.attention import recording
from deltaloom.deltas.base import Delta
from deltaloom.errors import RefusedError
from deltaloom.sites import Site, all_sites

TABLES = ("wpe", "position_embeddings", "embed_positions")
PLAIN_ROTATIONS = ("default", "linear", "llama3", "yarn")  # the others depend on the length of the text


class PositionShift(Delta):
    """Lets the text begin at a later position of the table of positions; it has no parameters."""

    changes_at_birth = "the text gets other positions"

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift

    def before(self, x: Tensor) -> Tensor:
        """Positions, each `shift` later."""
        return x + self.shift


def position_table(model: nn.Module) -> Site | None:
    """The site of a table of learned positions that is looked up by position; None if the model has none.

    Raises:
        RefusedError: there is one, but it is not looked up by position alone, so nothing can shift it.
    """
    tables = [(path, module) for path, module in model.named_modules()
              if isinstance(module, nn.Embedding) and path.rsplit(".", 1)[-1] in TABLES]
    if not tables:
        return None
    path, layer = tables[0]
    if len(tables) > 1 or type(layer) is not nn.Embedding:
        raise RefusedError("This model's positions cannot be shifted", got=f"{type(layer).__name__} at {path}",
                           legal="one plain table of positions")
    return next(site for site in all_sites(model) if site.path == path and site.kind == "embedding")


def is_rotary(model: nn.Module) -> bool:
    """Whether the model rotates its queries and keys by their positions."""
    return bool(_rotations(model))


def keys_values(model: PreTrainedModel, sites: Sequence[Site], ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, each (time, kv_heads, head_dim) in float32, that the model itself has for a row of tokens (time,).

    With rotary positions they are those of tokens right before the text; else those of a text's first tokens. An
    encoder-decoder reads the tokens on both sides.
    """
    ids = ids[None].to(model.device)
    inputs: dict[str, Any] = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    elif is_rotary(model):
        inputs["position_ids"] = torch.arange(-ids.shape[1], 0, device=model.device)[None]
    modules = [model.get_submodule(site.path) for site in sites]
    calls = _recorded(model, modules, inputs)
    return [(keys[0].transpose(0, 1).float().cpu(), values[0].transpose(0, 1).float().cpu()) for keys, values in calls]


def turned(model: PreTrainedModel, sites: Sequence[Site], keys: Sequence[Tensor], by: int) -> list[Tensor]:
    """Keys (P, kv_heads, head_dim) of each site as they are `by` positions later; unchanged where nothing is rotated.

    Raises:
        RefusedError: the model's rotation is not the common one, or depends on the length of the text.
    """
    if not is_rotary(model) or by == 0:
        return list(keys)
    modules = [model.get_submodule(site.path) for site in sites]
    # A lone token attends to itself alone, so that its hidden states are the same at any position: only its keys turn.
    # It is a made-up embedding, because real ones may be zero (pads), and so may their keys.
    table: Any = model.get_input_embeddings()
    token = torch.randn(1, 1, table.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(table.weight)
    places = (torch.full((1, 1), place, device=token.device) for place in (0, abs(by)))
    here, there = (_recorded(model, modules, {"inputs_embeds": token, "position_ids": place}) for place in places)
    found = []
    for site, module, own, (start, _), (end, _) in zip(sites, modules, keys, here, there, strict=True):
        if torch.equal(start, end):  # a layer without positions among rotated ones
            found.append(own)
            continue
        if (_turn(model, module, start, abs(by)) - end).norm() > 0.02 * end.norm():  # wide enough for bf16
            raise RefusedError("This layer does not rotate its keys in the common way", got=site.path)
        found.append(_turn(model, module, own.transpose(0, 1)[None].to(model.device), by)[0].transpose(0, 1).to(own.device))
    return found


def _recorded(model: PreTrainedModel, modules: Sequence[nn.Module], inputs: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), recording(model, modules) as found:
            model.base_model(**inputs)  # the head adds nothing, and the front of a cut model has none
    finally:
        model.train(training)
    return [found[module][0] for module in modules]


def _turn(model: nn.Module, attention: nn.Module, keys: Tensor, by: int) -> Tensor:
    """(batch, kv_heads, time, head_dim) rotated by that many positions, by the family's own function."""
    rotation = _rotations(model)[0]
    apply = vars(sys.modules[type(attention).__module__]).get("apply_rotary_pos_emb")
    if apply is None or len(_rotations(model)) > 1 or vars(rotation).get("rope_type") not in PLAIN_ROTATIONS:
        raise RefusedError("This model's rotation of keys is not a plain one", got=type(rotation).__name__,
                           legal=f"one rotation of type {', '.join(PLAIN_ROTATIONS)}")
    keys = keys.float()
    position = torch.full((1, 1), by, device=keys.device)
    cos, sin = (wave / rotation.attention_scaling for wave in rotation(keys, position))
    width = cos.shape[-1]
    rotated = apply(keys[..., :width], keys[..., :width], cos, sin)[1]
    return torch.cat([rotated, keys[..., width:]], dim=-1)


def _rotations(model: nn.Module) -> list[Any]:
    return [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "rotary_emb"]
