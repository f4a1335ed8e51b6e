"""Tiny models with calibration batches for the compressors' tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from deltaloom.compress.base import Compressor, Facts, Work
from deltaloom.data.batches import Batch, collate
from deltaloom.data.encode import Example
from tests.toys import VOCABULARY, toy, toy_batch

DECODERS = ("llama", "gpt2")
LAYOUTS = ("llama", "gpt2", "bert", "t5")


def batches(layout: str, count: int = 3, seed: int = 5) -> list[Batch]:
    """Padded batches of rows of different lengths, as the tasks make them."""
    generator = torch.Generator().manual_seed(seed)

    def ids(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    if layout == "vit":
        return [Batch({"pixel_values": toy_batch("vit", seed=seed + index)["pixel_values"]}, None, (), torch.ones(3), 15)
                for index in range(count)]
    kind = {"t5": "seq2seq", "bart": "seq2seq", "bert": "class", "roberta": "class", "distilbert": "class",
            "llama-classifier": "class"}.get(layout, "causal")
    found = []
    for _ in range(count):
        examples = []
        for row in range(4):
            tokens = ids(3, 12)
            labels: Any = {"seq2seq": ids(2, 9), "class": row % 3}.get(kind, tokens)
            length = len(tokens) + (len(labels) if kind == "seq2seq" else 0)
            examples.append(Example(row=row, input_ids=tokens, labels=labels, length=length))
        found.append(collate(examples, 0, kind, decoder_start=0))
    return found


def work(layout: str, *, dtype: torch.dtype = torch.float32, count: int = 3, seed: int = 0) -> Work:
    """A toy model and rows to calibrate on; the original can be had again."""
    task: Any = SimpleNamespace(name=layout)
    return Work(toy(layout, seed, dtype), task, batches(layout, count), original=lambda: toy(layout, seed, dtype),
                say=lambda _: None)


def meta(layout: str, dtype: torch.dtype = torch.float32) -> Any:
    """A toy without values, its ties kept."""
    model = toy(layout, dtype=dtype).to("meta")
    model.tie_weights()
    return model


def sketched(compressor: Compressor, layout: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model on the meta device after the sketch."""
    model = meta(layout, dtype)
    compressor.sketch(model)
    return model


def shapes(model: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and types of everything that is saved."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}


def compressed(compressor: Compressor, layout: str, **options: Any) -> tuple[Work, Facts]:
    """A toy after `apply`, held against the sketch on the way."""
    done = work(layout, **options)
    facts = compressor.apply(done)
    assert shapes(done.model) == shapes(sketched(compressor, layout, options.get("dtype", torch.float32)))
    return done, facts


@torch.no_grad()
def outputs(model: Any, layout: str) -> Tensor:
    """Logits of a batch."""
    return model(**toy_batch(layout, labels=layout in ("t5", "bart"))).logits
