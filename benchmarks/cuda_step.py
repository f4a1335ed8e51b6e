"""One training step of LoRA on a Llama-shaped model with random weights: ours, PEFT, and a plain torch loop.

    python benchmarks/cuda_step.py [--layers 16 --width 2048 --ffn 8192 --heads 32 --kv-heads 8 --vocab 128256] [--output FILE]

The shape is Llama-3.2-1B's if nothing else is said. All sides have the same frozen weights, rows, rank, sites, dtype and AdamW;
they take turns (A B C A B C), each with a model of its own that is gone before the next. Steps are timed together, between two
points where the device has finished. `peak` is the best rate of a square matrix product in the same dtype, measured in the same
run; `share_of_peak` is the floor of operations of a step (4 per frozen weight and token, the head at learned positions only)
over its time over that rate, so that work beyond the floor does not count as speed. `memory_bytes` is the peak beyond the loaded
model; on a CPU of resident memory, which a side may find freed already by the one before.

It runs wherever torch does: on a GPU if there is one, else on the CPU, where `--layers 2 --width 64` and the like are quick. The
sides' first losses are equal but for rounding; the last ones say whether they learned alike.

(Not called cuda.py: torch imports NVIDIA's package `cuda`, and a script's own folder comes first.)
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from deltaloom import attention
from deltaloom.data.batches import collate
from deltaloom.data.encode import IGNORED, Example
from deltaloom.deltas.lora import LoRA
from deltaloom.evaluate.causal_lm import causal_losses
from deltaloom.jobs.estimate import flops_per_token
from deltaloom.sites import all_sites
from deltaloom.train.memory import PeakMemory
from deltaloom.train.optimizer import make_optimizer
from deltaloom.train.settings import TrainSettings
from deltaloom.tuned import attach

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Step = Callable[[Any], Tensor]
"""The loss of a batch, after forward pass, backward pass and the optimizer's step."""


class Side(NamedTuple):
    """A way to take a step, and what it trains."""

    step: Step
    trained: int


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 16), ("width", 2048), ("ffn", 8192), ("heads", 32), ("kv-heads", 8), ("vocab", 128256),
                        ("rank", 16), ("rows", 8), ("tokens", 512), ("steps", 10), ("warm", 3), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--learned", type=float, default=0.5, help="share of each row's tokens, its last ones, that is learned")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--output", type=Path)
    return parser.parse_args(given)


def base(given: argparse.Namespace) -> transformers.LlamaForCausalLM:
    """The frozen model, the same at every call."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=given.vocab, hidden_size=given.width, intermediate_size=given.ffn, num_hidden_layers=given.layers,
        num_attention_heads=given.heads, num_key_value_heads=given.kv_heads, max_position_embeddings=given.tokens,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=0)
    with torch.device(given.device):
        model = transformers.LlamaForCausalLM(config)
    return model.to(DTYPES[given.dtype]).train().requires_grad_(False)


def batches(given: argparse.Namespace) -> list[Any]:
    """As many as are timed, each another one; rows are full, so that no side has padding."""
    generator = torch.Generator().manual_seed(1)
    found = []
    start = given.tokens - max(1, int(given.learned * given.tokens))
    for _ in range(given.steps):
        ids = torch.randint(2, given.vocab, (given.rows, given.tokens), generator=generator).tolist()
        rows = [Example(row, own, [IGNORED] * start + own[start:], len(own)) for row, own in enumerate(ids)]
        found.append(collate(rows, 0, "causal").to(given.device))
    return found


def ours(model: Any, given: argparse.Namespace) -> Side:
    attention.install(model)
    tuned = attach(model, [LoRA(rank=given.rank, alpha=2 * given.rank)]).train()
    parameters = tuned.delta_parameters()
    optimizer = make_optimizer(parameters, TrainSettings(learning_rate=1e-3))

    def step(batch: Any) -> Tensor:
        losses, _, _ = causal_losses(tuned, batch)
        return stepped(losses.mean(), list(parameters.values()), optimizer)

    return Side(step, sum(parameter.numel() for parameter in parameters.values()))


def peft(model: Any, given: argparse.Namespace) -> Side:
    from peft import LoraConfig, TaskType, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(task_type=TaskType.CAUSAL_LM, r=given.rank, lora_alpha=2 * given.rank,
                                               target_modules=TARGETS), autocast_adapter_dtype=False)
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    return plain_loop(wrapped, parameters)


class PlainLoRA(nn.Module):
    """What a page of a textbook does."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.randn(rank, layer.in_features, device=layer.weight.device) / layer.in_features ** 0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 2.0 * (x @ self.down.to(x.dtype).T @ self.up.to(x.dtype).T)


def plain(model: Any, given: argparse.Namespace) -> Side:
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name in TARGETS:
                if name in dict(part.named_children()):
                    setattr(part, name, PlainLoRA(part.get_submodule(name), given.rank))
    return plain_loop(model, [parameter for parameter in model.parameters() if parameter.requires_grad])


def plain_loop(model: Any, parameters: list[nn.Parameter]) -> Side:
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)

    def step(batch: Any) -> Tensor:
        loss = model(input_ids=batch.inputs["input_ids"], labels=batch.labels, use_cache=False).loss
        return stepped(loss, parameters, optimizer)

    return Side(step, sum(parameter.numel() for parameter in parameters))


def stepped(loss: Tensor, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Tensor:
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


SIDES: dict[str, Callable[[Any, argparse.Namespace], Side]] = {"ours": ours, "peft": peft, "plain": plain}


def finished(device: str) -> float:
    """The time, when the device has done everything."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(name: str, given: argparse.Namespace, data: list[Any]) -> dict[str, float]:
    """One side's turn."""
    model = base(given)
    memory = PeakMemory(torch.device(given.device))
    side = SIDES[name](model, given)
    losses = [side.step(data[index % len(data)]) for index in range(given.warm)]
    began = finished(given.device)
    losses += [side.step(batch) for batch in data]
    seconds = (finished(given.device) - began) / len(data)
    found = {"seconds": seconds, "memory_bytes": memory.peak() or 0, "trained": side.trained,
             "first_loss": float(losses[0]), "last_loss": float(losses[-1])}
    del model, side, losses
    gc.collect()
    if torch.device(given.device).type == "cuda":
        torch.cuda.empty_cache()
    return found


def peak_rate(given: argparse.Namespace) -> float:
    """Operations per second of the best square matrix product."""
    sizes = (4096, 8192) if torch.device(given.device).type == "cuda" else (512, 1024)
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=given.device).to(DTYPES[given.dtype]) for _ in range(2))
        for rounds in (2, 10):  # the first ones warm up
            began = finished(given.device)
            for _ in range(rounds):
                a @ b
            seconds = finished(given.device) - began
        best = max(best, rounds * 2 * size ** 3 / seconds)
    return best


def main(given: argparse.Namespace) -> dict[str, Any]:
    """All sides in turn; medians over the rounds."""
    data, peak = batches(given), peak_rate(given)
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in given.sides}
    for _ in range(given.rounds):
        for name in given.sides:
            turns[name].append(measured(name, given, data))
    tokens = given.rows * given.tokens
    with torch.device("meta"):
        sites = all_sites(base(argparse.Namespace(**{**vars(given), "device": "meta"})))
    found = {}
    for name, own in turns.items():
        middle = {key: statistics.median(turn[key] for turn in own) for key in own[0]}
        floor = flops_per_token(sites, int(middle["trained"]), max(1, int(given.learned * given.tokens)) / given.tokens) * tokens
        found[name] = middle | {"tokens_per_second": tokens / middle["seconds"], "floor_flops": floor,
                                "share_of_peak": floor / middle["seconds"] / peak}
    device = torch.cuda.get_device_name() if torch.device(given.device).type == "cuda" else platform.processor() or "cpu"
    shape = {key: value for key, value in vars(given).items() if key not in ("output", "sides")}
    return {"benchmark": "cuda_step", "device": device, "torch": torch.__version__, "shape": shape, "peak_flops": peak,
            "tokens_per_step": tokens, "sides": found}


if __name__ == "__main__":
    options = arguments()
    result = main(options)
    text = json.dumps(result, indent=1)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)
