"""Hugging Face's Trainer as the loop, with a method that needs more than a loss: the callback drives it.

    python examples/hf_trainer.py [MODEL]
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from deltaloom.deltas.full import Full
from deltaloom.deltas.lora import LoRA
from deltaloom.models.load import load_model
from deltaloom.train.hf import trainer_callback
from deltaloom.tuned import attach

TICKETS = Path(__file__).parent / "tickets"


def main(source: str = "bundled:minilm", steps: int = 75, size: int = 16) -> float:
    rows = [json.loads(line) for line in (TICKETS / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    names = sorted({row["label"] for row in rows})
    torch.manual_seed(0)
    loaded = load_model(source, task="sequence-classification", labels=names, dtype=torch.float32)
    tuned = attach(loaded.model, [LoRA(rank=8)], heads=[Full(targets="classifier")])

    def collate(part: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        inputs = loaded.tokenizer([row["text"] for row in part], padding=True, truncation=True, max_length=64,
                                  return_tensors="pt")
        return {**inputs, "labels": torch.tensor([names.index(row["label"]) for row in part])}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=size, learning_rate=1e-3, save_strategy="no",
            report_to=[], use_cpu=True,
            remove_unused_columns=False,  # the Trainer cannot see through the wrapper which inputs the model takes
            max_grad_norm=0.0)            # the callback clips, after penalties and controllers have acted
        trainer = Trainer(model=tuned, args=arguments, train_dataset=rows, data_collator=collate,
                          callbacks=[trainer_callback(tuned, clip=1.0)])
        result = trainer.train()
    print(f"mean training loss {result.training_loss:.3f} after {steps} steps")
    return result.training_loss


if __name__ == "__main__":
    main(*sys.argv[1:2])
