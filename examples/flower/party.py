"""A data owner in a Flower federation: model and rows stay in this process, which waits at its mailbox for joint rounds.

    python examples/flower/party.py FOLDER NAME PART OF [MODEL]
"""

import json
import sys
from pathlib import Path

import torch

from deltaloom.checkpoint import native
from deltaloom.deltas.full import Full
from deltaloom.deltas.lora import LoRA
from deltaloom.models.load import load_model
from deltaloom.private.joining import Participant
from deltaloom.private.mailbox import Mailbox
from deltaloom.tuned import attach

TICKETS = Path(__file__).parents[1] / "tickets"


class Party:
    """One part of the tickets, and a model with a delta; everyone's delta begins the same."""

    def __init__(self, source: str = "bundled:minilm", part: int = 0, of: int = 1) -> None:
        rows = [json.loads(line) for line in (TICKETS / "train.jsonl").read_text(encoding="utf-8").splitlines()]
        self.names = sorted({row["label"] for row in rows})
        self.rows = rows[part::of]
        torch.manual_seed(0)   # the new head begins the same everywhere
        self.loaded = load_model(source, task="sequence-classification", labels=self.names, dtype=torch.float32)
        self.tuned = attach(self.loaded.model, [LoRA(rank=8)], heads=[Full(targets="classifier")], seed=0)

    def train(self, number: int, common: dict[str, torch.Tensor], steps: int = 10, size: int = 8):
        """A round: a few steps from the common values; what became of them, and the rows that it took."""
        self.tuned.load_delta_state(common)
        optimizer = torch.optim.AdamW([p for p in self.tuned.parameters() if p.requires_grad], lr=1e-3)
        self.tuned.train()
        for step in range((number - 1) * steps, number * steps):
            batch = [self.rows[(step * size + i) % len(self.rows)] for i in range(size)]
            loss = self.tuned(**self.encode(batch)).loss + self.tuned.penalty()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"round {number}: loss {loss.item():.3f}", flush=True)
        return self.tuned.delta_state(), steps * size

    def encode(self, batch: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        inputs = self.loaded.tokenizer([row["text"] for row in batch], padding=True, truncation=True, max_length=64,
                                       return_tensors="pt")
        return {**inputs, "labels": torch.tensor([self.names.index(row["label"]) for row in batch])}


def main(folder: Path, name: str, part: int, of: int, source: str = "bundled:minilm") -> None:
    party = Party(source, part, of)
    (folder / name).mkdir(parents=True, exist_ok=True)
    mailbox = Mailbox(folder / f"{name}.sock", name, party.tuned.delta_state(), say=lambda text: print(text, flush=True))
    try:
        common = Participant(name, folder / name, mailbox.ask, party.train, wait=lambda stand: None).run()
    finally:
        mailbox.close()
    party.tuned.load_delta_state(common)
    native.save(party.tuned, folder / name / "delta", replace=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:6])
