"""One training run of a peer on prepared tokens, in the environment that has it; prints its figures as JSON. See speed.py.

    python benchmarks/speed_peer.py trainer|trainer-fp32|trl METHOD FOLDER BATCH RATE
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import peers
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

CLASSES = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def loaded(rows: dict[str, Any], method: str, fp32: bool, steps: int) -> Any:
    """The model in bf16 with PEFT's method on it."""
    import peft

    causal = not rows["labels"]
    if causal:
        model = AutoModelForCausalLM.from_pretrained(rows["model"], dtype=torch.bfloat16)
    else:  # in fp32 under bf16 autocast: what Trainer does with bf16=True
        model = AutoModelForSequenceClassification.from_pretrained(rows["model"], num_labels=rows["labels"])
    common = {"task_type": peft.TaskType.CAUSAL_LM if causal else peft.TaskType.SEQ_CLS}
    targets = DECODER if causal else CLASSES
    if method == "prefix":
        config = peft.PrefixTuningConfig(num_virtual_tokens=16, **common)
    elif method == "adalora":
        config = peft.AdaLoraConfig(init_r=12, target_r=8, tinit=max(1, steps // 10), tfinal=max(1, int(0.4 * steps)), deltaT=10,
                                    total_step=steps, lora_alpha=16, target_modules=targets, **common)
    else:
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, **common)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=fp32 or not causal)


class Allocation(TrainerCallback):
    """What PEFT's AdaLoRA needs after every optimizer step."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.model.base_model.update_and_allocate(state.global_step)


def trl_trainer(model: Any, rows: dict[str, Any], batch: int, rate: float) -> tuple[peers.LoopClock, Any]:
    """SFTTrainer at settings that serve it well here: bf16, grouped by length, no checkpointing."""
    import tempfile

    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    clock = peers.LoopClock()
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch, learning_rate=rate, num_train_epochs=1,
        lr_scheduler_type="linear", warmup_steps=0.06, max_grad_norm=1.0, weight_decay=0.0, seed=0, bf16=True, use_cpu=True,
        train_sampling_strategy="group_by_length", save_strategy="no", eval_strategy="no", logging_strategy="no", report_to=[],
        disable_tqdm=True, dataloader_num_workers=0, max_length=None, gradient_checkpointing=False)
    data = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows["train"]])
    return clock, SFTTrainer(model=model, args=arguments, train_dataset=data, callbacks=[clock],
                             processing_class=AutoTokenizer.from_pretrained(rows["model"]))


def padded_class(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Right-padded ids and mask, a class a row."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}


@torch.no_grad()
def class_loss(model: Any, rows: list[dict[str, Any]]) -> float:
    """Mean cross-entropy of a row."""
    model.eval()
    losses = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for start in range(0, len(rows), 64):
            batch = padded_class(rows[start:start + 64])
            losses += [float(model(**batch).loss.float()) * len(batch["labels"])]
    return sum(losses) / len(rows)


def resident(key: str) -> int:
    return int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) * 1024  # type: ignore[index]


def main() -> None:
    side, method, folder, batch, rate = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
    rows = json.loads((folder / "tokens.json").read_text())
    torch.manual_seed(0)
    model = loaded(rows, method, side == "trainer-fp32", -(-len(rows["train"]) // batch))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    if side == "trl":
        clock, trainer = trl_trainer(model, rows, batch, rate)
    else:
        collate = padded_class if rows["labels"] else peers.pad_causal
        clock, trainer = peers.trainer_for(model, rows["train"], rows["eval"], collate, rate=rate, seed=0, epochs=1, batch=batch,
                                            bf16=True)
    if method == "adalora":
        trainer.add_callback(Allocation(model))
    trainer.train()
    peak = resident("VmHWM") - before
    loss = class_loss(model, rows["eval"]) if rows["labels"] else peers.causal_loss(model, rows["eval"])
    print(json.dumps({"seconds": clock.seconds, "tokens": sum(len(row["input_ids"]) for row in rows["train"]), "peak_bytes": peak,
                      "loss": loss}))


if __name__ == "__main__":
    main()
