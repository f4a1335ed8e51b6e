"""What the tests of compressors share: a deep toy with work to do on it, and a toy that learned something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaloom.compress.base import Work
from deltaloom.data.batches import Batch
from deltaloom.data.encode import IGNORED, Example
from tests.toys import VOCABULARY, toy

CLASSES = ("bert", "vit")


class ToyTask:
    """A task on token ids alone, without a tokenizer: what compressors ask of a task."""

    def __init__(self, layout: str) -> None:
        self.layout, self.generates = layout, layout not in CLASSES

    def encode(self, count: int = 8, time: int = 9, seed: int = 3) -> list[Example]:
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for row in range(count):
            length = time - row % 3
            ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
            labels: Any = row % 3 if not self.generates else ids if self.layout != "t5" else ids[:4]
            rows.append(Example(row, ids, labels, length=length + (4 if self.layout == "t5" else 0)))
        return rows

    def collate(self, examples: Sequence[Example]) -> Batch:
        from deltaloom.data.batches import collate

        kind = "class" if not self.generates else "seq2seq" if self.layout == "t5" else "causal"
        return collate(examples, 0, kind, 0)  # type: ignore[arg-type]

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs = batch.inputs if not self.generates else batch.inputs | {"use_cache": False}
        scores = model(**inputs).logits.float()
        assert batch.labels is not None
        if not self.generates:
            return F.cross_entropy(scores, batch.labels, reduction="none"), torch.ones(len(batch.labels))
        wanted = batch.labels if self.layout == "t5" else F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        places = wanted != IGNORED
        return F.cross_entropy(scores[places], wanted[places], reduction="none"), places

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
        losses, _ = self.losses(model, batch)
        return losses.sum(), float(losses.numel())

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        losses, _ = self.losses(model, batch)
        return [{"loss": float(losses.mean())}] * len(batch.rows)


def deep_toy(layout: str, blocks: int = 4, seed: int = 0) -> Any:
    """A toy with more blocks; each block another."""
    return toy(layout, seed=seed, blocks=blocks)


def work_on(model: Any, layout: str, rows: int = 8, **more: Any) -> Work:
    task: Any = ToyTask(layout)
    examples = task.encode(rows)
    return Work(model, task, [task.collate(examples[start:start + 4]) for start in range(0, rows, 4)], examples,
                say=lambda text: None, **more)


def meta_of(model: Any) -> Any:
    """The same model without values."""
    import copy

    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config)).to(model.dtype)
