"""What the tests of commands share: tiny models in folders, files of rows of every format, and a way to run a command."""

from __future__ import annotations

import functools
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from tests.toy_tokenizers import byte_level, unigram, word_piece

WIDTH = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_DROP = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GOOD, BAD, OTHER = ("good", "film", "coffee"), ("bad", "city", "shop"), ("the", "is", "a", "in", "it", "and")


def make_model(kind: str, folder: Path, seed: int = 0) -> Path:
    """A tiny random model with its tokenizer or image processor, as `save_pretrained` writes them."""
    torch.manual_seed(seed)
    if kind == "vit":
        transformers.ViTModel(transformers.ViTConfig(**WIDTH, **NO_DROP, image_size=8, patch_size=4)).save_pretrained(folder)
        transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
        return folder
    tokenizer = {"bert": word_piece, "llama": byte_level, "t5": unigram}[kind]()
    size = len(tokenizer)
    if kind == "bert":
        config = transformers.BertConfig(**WIDTH, **NO_DROP, vocab_size=size, max_position_embeddings=64)
        model: Any = transformers.BertModel(config)
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            **WIDTH, vocab_size=size, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0,
            eos_token_id=tokenizer.eos_token_id))
    else:
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=size, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0,
            decoder_start_token_id=0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def records(kind: str, count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a format, unequal in length, with something to learn in them."""
    generator = random.Random(seed)
    found: list[dict[str, Any]] = []
    for index in range(count):
        good = index % 2 == 0
        words = [generator.choice(GOOD if good else BAD), *generator.choices(OTHER, k=generator.randint(2, 7))]
        generator.shuffle(words)
        text = " ".join(words)
        found.append({
            "text-label": {"text": text, "label": "good" if good else "bad"},
            "regression": {"text": text, "label": float(good) + 0.5},
            "tokens": {"tokens": words, "tags": ["B-X" if word in GOOD else "B-Y" if word in BAD else "O" for word in words]},
            "prompt-completion": {"prompt": text, "completion": "It is good." if good else "It is bad."},
            "messages": {"messages": [{"role": "user", "content": text},
                                      {"role": "assistant", "content": "good" if good else "bad"}]},
        }[kind])
    return found


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@functools.cache
def shared_models(root: Path) -> dict[str, Path]:
    """The models of one test session by kind; `other-bert` has other weights than `bert`."""
    made = {kind: make_model(kind, root / kind) for kind in ("bert", "llama", "t5", "vit")}
    made["other-bert"] = make_model("bert", root / "other-bert", seed=1)
    return made


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return shared_models(tmp_path_factory.getbasetemp() / "models")


TASKS = {  # what makes a small run of each: the task, the model and the rows
    "classes": ("sequence-classification", "bert", "text-label"),
    "numbers": ("regression", "bert", "regression"),
    "tags": ("token-classification", "bert", "tokens"),
    "prompts": ("causal-lm", "llama", "prompt-completion"),
    "chats": ("causal-lm", "llama", "messages"),
    "pairs": ("seq2seq-lm", "t5", "prompt-completion"),
}


def run_values(kind: str, models: dict[str, Path], folder: Path, deltas: list[dict[str, Any]], **train: Any) -> dict[str, Any]:
    """The mapping of a run file whose rows are written to `folder`."""
    task, model, rows = TASKS[kind]
    write_rows(folder / "train.jsonl", records(rows))
    write_rows(folder / "dev.jsonl", records(rows, 12, seed=1))
    length = 64 if model == "bert" else 128
    settings = {"max_steps": 4, "batch_size": 8, "learning_rate": 1e-2, "precision": "fp32"} | train
    return {"model": str(models[model]), "task": task, "train": settings, "output": str(folder / "run"),
            "data": {"train": "train.jsonl", "eval": "dev.jsonl", "max_length": length}, "deltas": deltas}


def write_run(folder: Path, values: dict[str, Any], name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


@dataclass
class Done:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


class Command:
    """Calls the command line in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, *arguments: object, stdin: str = "") -> Done:
        from deltaloom.cli.main import main

        out, err = io.StringIO(), io.StringIO()
        with self.monkeypatch.context() as patch:
            patch.setattr("sys.stdout", out)
            patch.setattr("sys.stderr", err)
            patch.setattr("sys.stdin", io.StringIO(stdin))
            try:
                main([str(argument) for argument in arguments])
                code = 0
            except SystemExit as end:
                code = 0 if end.code is None else int(end.code)
        return Done(code, out.getvalue(), err.getvalue())

    def json(self, *arguments: object) -> dict[str, Any]:
        """The object that a command prints with --json; it has to succeed, and print nothing else there."""
        done = self(*arguments, "--json")
        assert done.code == 0, done.err
        assert done.out.count("\n") == 1
        return done.json

    def refused(self, *arguments: object, code: int = 2) -> str:
        """The message of a command that has to fail; nothing on standard output, and no fault of ours."""
        done = self(*arguments)
        assert done.code == code, (done.code, done.err)
        assert done.out == ""
        assert "fault of deltaloom" not in done.err and "Traceback" not in done.err
        return done.err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(monkeypatch)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
