"""Prompt tuning: trainable rows in front of the input embeddings.

    model([P; embed(x)])

Addition-based delta tuning. Lester, Al-Rfou and Constant 2021 (arXiv 2104.08691). Causal models, encoders, and the encoder
of encoder-decoders. The rows take the first positions, and the text follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from deltaloom.deltas._peft import refuse_fields
from deltaloom.deltas._tokens import check_reads_embeddings, text_tokens, vocabulary_tokens
from deltaloom.deltas.base import AttachContext, Attachment, Components, Delta, InputDelta, Method, PeftPart, PeftReading
from deltaloom.errors import CheckpointError, RefusedError
from deltaloom.sites import Kind, Site, all_sites

PEFT_TYPE = "PROMPT_TUNING"
PEFT_READ = ("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
             "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
             "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "modules_to_save")


class PromptDelta(InputDelta):
    """The rows, (length, d_model)."""

    changes_at_birth = "the model reads new rows from the start"

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.prompt = nn.Parameter(rows)

    def rows(self) -> Tensor:
        """The parameters themselves."""
        return self.prompt


class Prompt(Method):
    """Trainable rows in front of the input embeddings."""

    name: ClassVar[str] = "prompt"
    kinds: ClassVar[tuple[Kind, ...]] = ("input",)
    peft_types: ClassVar[tuple[str, ...]] = (PEFT_TYPE,)

    targets: str | tuple[str, ...] = "input"
    """The input embeddings; a model has one place for a prompt."""
    length: int = Field(16, ge=1)
    """Number of rows."""
    init: Literal["random", "vocabulary", "text"] = "vocabulary"
    """Initial values: random ones as large as embeddings are, the embeddings of randomly chosen tokens, or those of `text`."""
    text: str | None = None
    """With init text: its first `length` tokens, begun again where it has fewer."""

    @model_validator(mode="after")
    def _check_init(self) -> Prompt:
        if (self.text is not None) != (self.init == "text"):
            raise ValueError("text belongs to init: text, and init: text needs a text")
        return self

    def attach(self, sites: Sequence[Site], context: AttachContext) -> Attachment:
        """The one prompt.

        Raises:
            RefusedError: a classifier that reads the last token cannot find it behind a prompt.
        """
        check_reads_embeddings(context.model)
        return Attachment({site: PromptDelta(self._initial(site, context)) for site in sites})

    def components(self, delta: Delta) -> Components:
        """Rows."""
        return Components({"prompt": 0})

    def resized(self, site: Site, count: int) -> dict[str, Any]:
        """The number of rows."""
        return {"length": count}

    def _initial(self, site: Site, context: AttachContext) -> Tensor:
        layer = context.layer(site)
        if not isinstance(layer, nn.Embedding):
            raise RefusedError("A prompt needs token embeddings", got=type(layer).__name__)
        if context.loading:
            return torch.zeros(self.length, site.d_in)
        if self.init == "random":
            known = _embedded(layer, torch.arange(layer.num_embeddings))
            return torch.randn(self.length, site.d_in, generator=context.generator) * known.std() + known.mean()
        if self.init == "text":
            ids = text_tokens(context.tokenizer, str(self.text), self.length)
        else:
            ids = vocabulary_tokens(context.model, context.tokenizer, self.length, context.generator)
        return _embedded(layer, ids)

    def to_peft(self, attachment: Attachment, model: nn.Module) -> PeftPart:
        """The rows as they are."""
        settings = _one_stack(model)
        (site, delta), = attachment.deltas.items()
        if not isinstance(delta, PromptDelta):
            raise RefusedError("this is no prompt", got=type(delta).__name__)
        config = {"peft_type": PEFT_TYPE, "num_virtual_tokens": self.length, "token_dim": site.d_in,
                  "num_transformer_submodules": 1, "num_attention_heads": settings.num_attention_heads,
                  "num_layers": settings.num_hidden_layers, "prompt_tuning_init": "RANDOM"}
        return PeftPart(config, {"prompt_embeddings": delta.prompt.detach().float().contiguous()})

    @classmethod
    def from_peft(cls, adapter: PeftPart, model: nn.Module) -> PeftReading | None:
        """The rows as they are."""
        if "prompt_embeddings" not in adapter.tensors:
            raise CheckpointError("the adapter has no prompt_embeddings", got=sorted(adapter.tensors)[:8])
        refuse_fields(adapter.config, PEFT_READ)
        _one_stack(model)
        rows = adapter.tensors["prompt_embeddings"].float()
        site = next(site for site in all_sites(model) if site.kind == "input")
        if rows.ndim != 2 or rows.shape[1] != site.d_in:
            raise CheckpointError("the adapter's prompt does not fit this model", got=tuple(rows.shape),
                                  legal=f"(length, {site.d_in})")
        return PeftReading(cls(length=len(rows), init="random"), {site.name: {"prompt": rows}}, frozenset({"prompt_embeddings"}))


def _embedded(layer: nn.Embedding, ids: Tensor) -> Tensor:
    """What the model reads for these tokens, not the table's rows: some families scale what they look up."""
    with torch.no_grad():
        return layer(ids.to(layer.weight.device)).float().cpu()


def _one_stack(model: nn.Module) -> PreTrainedConfig:
    if not isinstance(model, PreTrainedModel):
        raise RefusedError("PEFT's prompts are for models of transformers", got=type(model).__name__)
    if model.config.is_encoder_decoder:
        raise RefusedError("PEFT's prompt of encoder-decoders has rows for the decoder too; it has no counterpart here",
                           got=model.config.model_type, hint="Keep the native format.")
    return model.config
