"""What the tests of compressors share: a deep toy with work to do on it, and a toy that learned something."""

from __future__ import annotations

import functools
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


def counting(rows: int, seed: int, time: int = 12) -> list[Example]:
    """Rows with something to learn: each counts on from a random start with one of three strides."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for row in range(rows):
        start, stride = int(torch.randint(0, 50, (), generator=generator)), int(torch.randint(1, 4, (), generator=generator))
        ids = [3 + (start + stride * place) % (VOCABULARY - 3) for place in range(time)]
        found.append(Example(row, ids, ids, length=time))
    return found


@functools.cache
def _learned(seed: int) -> dict[str, Tensor]:
    model = deep_toy("llama", 4, seed)
    task = ToyTask("llama")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(250):
        optimizer.zero_grad()
        total, count = task.loss(model, task.collate(counting(32, seed=100 + step)))
        (total / count).backward()
        optimizer.step()
    return {key: value.detach() for key, value in model.state_dict().items()}


def learned_toy(seed: int = 0) -> Any:
    """A Llama of four blocks that learned to count."""
    model = deep_toy("llama", 4, seed)
    model.load_state_dict(_learned(seed))
    return model


def held_out_loss(model: Any) -> float:
    """Per token, on rows that no test trains on."""
    task = ToyTask("llama")
    with torch.no_grad():
        total, count = task.loss(model, task.collate(counting(64, seed=7)))
    return float(total) / count


def counting_work(model: Any, rows: int = 256, **more: Any) -> Work:
    """Work on the rows of `counting`; the teacher is the toy that learned."""
    task: Any = ToyTask("llama")
    examples = counting(rows, seed=5)
    return Work(model, task, [task.collate(examples[:16])], examples, original=learned_toy, say=lambda text: None, **more)
