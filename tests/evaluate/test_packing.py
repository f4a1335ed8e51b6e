"""Packed rows: losses and gradients of separate rows."""

from __future__ import annotations

import pytest
import torch

from deltaloom import attention
from deltaloom.data.batches import collate, pack
from deltaloom.data.encode import IGNORED, Example
from deltaloom.deltas.lora import LoRA
from deltaloom.evaluate.causal_lm import causal_losses
from deltaloom.tuned import attach
from tests.toys import toy


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for row, size in enumerate((5, 9, 2, 7)):
        ids = torch.randint(3, 60, (size,), generator=generator).tolist()
        found.append(Example(row, ids, [IGNORED] * (size // 2) + ids[size // 2:], size))
    return found


@pytest.mark.parametrize("layout", ["llama", "gpt2", "qwen3", "gemma", "phi3"])
def test_packed_rows_are_separate_rows(layout: str) -> None:
    tuned = attach(toy(layout), [LoRA(rank=2)], seed=1)
    attention.install(tuned.model)
    with torch.no_grad():
        for name, parameter in tuned.delta_parameters().items():
            parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    results = []
    for batch in (collate(examples(), 0, "causal"), pack(examples())):
        tuned.zero_grad()
        losses, places, _ = causal_losses(tuned, batch)
        losses.sum().backward()
        results.append((losses.sum(), len(places), [p.grad.clone() for p in tuned.delta_parameters().values()]))
    (padded, count, grads), (packed, same, other) = results
    assert count == same
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(other, grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_packing_has_no_padding_and_learns_no_first_token() -> None:
    rows = examples()
    rows[1] = Example(1, rows[1].input_ids, rows[1].input_ids, 9)  # would learn its first token if rows were joined carelessly
    batch = pack(rows)
    assert batch.padded_tokens == batch.tokens == 23
    assert batch.labels is not None and batch.labels[0, 5] == IGNORED
    assert batch.inputs["position_ids"][0, 5] == 0


def test_a_task_without_packing_says_so() -> None:
    from deltaloom.errors import RefusedError
    from deltaloom.evaluate import task_named

    with pytest.raises(RefusedError, match="packing"):
        task_named("regression").pack(task_named("regression").__new__(task_named("regression")), [])
