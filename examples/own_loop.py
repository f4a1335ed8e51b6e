"""A loop of your own: tune a classifier with plain PyTorch, save the delta, load it on a fresh model.

    python examples/own_loop.py [MODEL]
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from deltaloom.checkpoint.native import load, save
from deltaloom.deltas.full import Full
from deltaloom.deltas.lora import LoRA
from deltaloom.models.load import load_model
from deltaloom.tuned import attach

TICKETS = Path(__file__).parent / "tickets"


def main(source: str = "bundled:minilm", steps: int = 75, size: int = 16) -> tuple[float, float]:
    rows = [json.loads(line) for line in (TICKETS / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    names = sorted({row["label"] for row in rows})
    torch.manual_seed(0)
    loaded = load_model(source, task="sequence-classification", labels=names, dtype=torch.float32)

    # The frozen model with its delta: LoRA inside, and the new head, which trains as a whole.
    tuned = attach(loaded.model, [LoRA(rank=8)], heads=[Full(targets="classifier")])
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)

    def encode(part: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        inputs = loaded.tokenizer([row["text"] for row in part], padding=True, truncation=True, max_length=64,
                                  return_tensors="pt")
        return {**inputs, "labels": torch.tensor([names.index(row["label"]) for row in part])}

    losses = []
    tuned.train()
    for step in range(steps):
        batch = encode([rows[(step * size + i) % len(rows)] for i in range(size)])
        loss = tuned(**batch).loss + tuned.penalty()  # the penalty is 0 for most methods
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    tuned.eval()
    sample = encode(rows[:32])
    with torch.no_grad():
        logits = tuned(**sample).logits
        with tempfile.TemporaryDirectory() as folder:
            written = save(tuned, Path(folder) / "delta")
            again = load(tuned.detach(), Path(folder) / "delta")  # on the bare model, which is as it was
        difference = (again(**sample).logits - logits).abs().max().item()
    first, last = sum(losses[:5]) / len(losses[:5]), sum(losses[-5:]) / len(losses[-5:])
    print(f"loss {first:.3f} -> {last:.3f}; the delta takes {written / 1e3:.0f} kB; loaded again it differs by {difference:g}")
    return first, last


if __name__ == "__main__":
    main(*sys.argv[1:2])
