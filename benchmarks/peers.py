"""The peer that deltaloom is measured against: transformers' Trainer with PEFT, at settings that serve it well.

Same weights, rows, tokens, rank, targets, batch and rates as ours; length-grouped batches, bf16 autocast, no padding beyond
the longest row. Seconds are those of the training loop alone.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

IGNORED = -100


class LoopClock(TrainerCallback):
    """Seconds between the first and the last step of training."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def classify(path: str, train: list[dict], dev: list[dict], labels: list[str], *, rate: float, seed: int, epochs: float,
             batch: int = 32, max_length: int = 128, rank: int = 8, alpha: int = 16, bf16: bool = True) -> dict[str, float]:
    """LoRA on all linears of the encoder's blocks plus the classification head; accuracy on dev and seconds."""
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(labels))
    targets = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
    model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=alpha, target_modules=targets))
    encode = lambda rows: [{**tokenizer(r["text"], truncation=True, max_length=max_length),  # noqa: E731
                            "labels": labels.index(r["label"])} for r in rows]
    examples, held = encode(train), encode(dev)
    clock, trainer = trainer_for(model, examples, held, lambda rows: tokenizer.pad(rows, return_tensors="pt"), rate=rate,
                                 seed=seed, epochs=epochs, batch=batch, bf16=bf16)
    trainer.train()
    found = trainer.predict(held)  # in the order of a sampler that groups by length: its own labels go with it
    accuracy = float((np.argmax(found.predictions, -1) == found.label_ids).mean())
    tokens = sum(len(e["input_ids"]) for e in examples) * epochs
    return {"accuracy": accuracy, "seconds": clock.seconds, "tokens_per_second": tokens / clock.seconds}


def generate_text(path: str, examples: list[dict], held: list[dict], *, rate: float, seed: int, epochs: float, batch: int = 16,
                  rank: int = 8, alpha: int = 16, bf16: bool = True) -> dict[str, float]:
    """LoRA on all linears of a causal model; `examples` have input_ids and labels. Loss per label token on `held`."""
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(seed)
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, r=rank, lora_alpha=alpha, target_modules=targets),
                           autocast_adapter_dtype=False)  # bf16 adapters: PEFT's fastest setting here
    clock, trainer = trainer_for(model, examples, held, pad_causal, rate=rate, seed=seed, epochs=epochs, batch=batch, bf16=bf16)
    trainer.train()
    loss = causal_loss(model, held)
    tokens = sum(len(e["input_ids"]) for e in examples) * epochs
    return {"loss": loss, "seconds": clock.seconds, "tokens_per_second": tokens / clock.seconds}


def pad_causal(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Right-padded ids, labels and mask."""
    width = max(len(r["input_ids"]) for r in rows)
    pad = lambda name, value: torch.tensor([r[name] + [value] * (width - len(r[name])) for r in rows])  # noqa: E731
    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", IGNORED), "attention_mask": mask}


@torch.no_grad()
def causal_loss(model: torch.nn.Module, rows: list[dict], batch: int = 16) -> float:
    """Mean loss per label token, in nats: the same yardstick for everybody."""
    model.eval()
    rows = sorted(rows, key=lambda r: len(r["input_ids"]))
    total, count = 0.0, 0
    for start in range(0, len(rows), batch):
        padded = pad_causal(rows[start:start + batch])
        logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits[:, :-1].float()
        labels = padded["labels"][:, 1:]
        total += float(torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1),
                                                         ignore_index=IGNORED, reduction="sum"))
        count += int((labels != IGNORED).sum())
    return total / count


def trainer_for(model: Any, train: list, held: list, collate: Any, *, rate: float, seed: int, epochs: float, batch: int,
                bf16: bool) -> tuple[LoopClock, Trainer]:
    """The Trainer with the settings of the page, and the clock of its loop."""
    clock = LoopClock()
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch, per_device_eval_batch_size=64, learning_rate=rate,
        num_train_epochs=epochs, lr_scheduler_type="linear", warmup_steps=0.06, max_grad_norm=1.0, weight_decay=0.0, seed=seed,
        train_sampling_strategy="group_by_length", bf16=bf16, use_cpu=not torch.cuda.is_available(), save_strategy="no",
        eval_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, dataloader_num_workers=0,
        remove_unused_columns=False)
    return clock, Trainer(model=model, args=arguments, train_dataset=train, eval_dataset=held, data_collator=collate,
                          callbacks=[clock])
