"""Inputs that need no data: to compare two models' outputs, and to time them side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from deltaloom.models import LoadedModel
from deltaloom.models.quiet import quiet_transformers

ROWS, TOKENS = 2, 16
WRITTEN = 32  # tokens that a language model writes to be timed


def probe(loaded: LoadedModel) -> dict[str, Tensor]:
    """Random inputs of the model's kind, always the same."""
    generator = torch.Generator().manual_seed(0)
    config = loaded.model.config
    if loaded.processor is not None:
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        shape = (ROWS, getattr(config, "num_channels", 3), size, size)
        return {"pixel_values": torch.randn(shape, generator=generator).to(loaded.model.dtype)}
    ids = torch.randint(3, config.get_text_config().vocab_size, (ROWS, TOKENS), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}


@torch.no_grad()
def side_by_side(models: Sequence[PreTrainedModel], inputs: dict[str, Tensor], repeats: int = 5) -> list[float]:
    """Seconds that each model takes for one generated token (or for one row, where it writes nothing): the median.

    The models take turns, after one turn that does not count, so that a busy machine slows all of them alike.
    """
    one = {key: value[:1] for key, value in inputs.items() if key != "decoder_input_ids"}
    times: list[list[float]] = [[] for _ in models]
    with quiet_transformers():
        for turn in range(repeats + 1):
            for model, found in zip(models, times, strict=True):
                began = time.perf_counter()
                count = _run(model.eval(), one)
                if turn:
                    found.append((time.perf_counter() - began) / count)
    return [statistics.median(found) for found in times]


def _run(model: PreTrainedModel, inputs: dict[str, Tensor]) -> int:
    """One turn; gives back how many tokens or rows it was."""
    if not model.can_generate():
        model(**inputs)
        return 1
    pad = model.config.pad_token_id or 0
    settings = GenerationConfig(max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, do_sample=False, pad_token_id=pad,
                                eos_token_id=None, decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None))
    model.generate(  # type: ignore[operator]
        **inputs, attention_mask=torch.ones_like(inputs["input_ids"]), generation_config=settings)
    return WRITTEN
