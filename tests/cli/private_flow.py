"""What the tests of the commands of private tuning share: a toy model, its emulator, and real processes of the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from deltaloom.jobs.compress import compress
from deltaloom.jobs.compressfile import run_of
from deltaloom.private.process import shared_environment
from tests.jobs.small import WIDTH, write_rows, write_run
from tests.toy_tokenizers import byte_level

ROOT = Path(__file__).parents[2]
CANARY = "zanzibar-quokka-7741"
PREFIX = {"method": "prefix", "length": 3}
COMMAND = [sys.executable, "-c", "from deltaloom.cli.main import main; main()"]


def toy_model(folder: Path, blocks: int = 4, seed: int = 0) -> Path:
    """A tiny Llama with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = byte_level()
    config = transformers.LlamaConfig(**WIDTH | {"num_hidden_layers": blocks}, vocab_size=len(tokenizer), num_key_value_heads=2,
                                      max_position_embeddings=256, bos_token_id=0, eos_token_id=tokenizer.eos_token_id)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def emulator_of(model: Path, folder: Path) -> Path:
    """The command's own emulator: one block kept at each end, one of the two between."""
    compress(run_of(str(model), "emulator", {"keep_first": "1", "keep_last": "1", "middle": "1"}, [],
                    top={"output": str(folder), "task": None, "calibration": None, "precision": None, "seed": None, "data": None},
                    distil=None), say=lambda text: None)
    return folder


def rows_of(count: int, word: str = "good", secret: bool = False) -> list[dict[str, str]]:
    """Rows with something to learn, and a secret word in some prompts."""
    return [{"prompt": f"The film number {index % 7} {CANARY if secret and index % 3 == 0 else 'x'}.",
             "completion": f"It is {word}."} for index in range(count)]


def run_file(folder: Path, emulator: Path, *, count: int = 16, word: str = "good", secret: bool = False,
             private: dict[str, Any] | None = None, **train: Any) -> Path:
    """A party's rows and its run file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", rows_of(count, word, secret))
    write_rows(folder / "dev.jsonl", rows_of(6, word))
    values = {"model": str(emulator), "task": "causal-lm", "deltas": [PREFIX],
              "data": {"train": "train.jsonl", "eval": "dev.jsonl", "max_length": 64},
              "train": {"max_steps": 4, "batch_size": 8, "learning_rate": 0.05, "precision": "fp32"} | train,
              "private": {"cut": 1, "codec": "fp32"} | (private or {})}
    return write_run(folder, values)


class Process:
    """One command as a process of its own; its output goes to a file."""

    def __init__(self, log: Path, *arguments: object) -> None:
        environment = shared_environment(dict(os.environ)) | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
        self.log, self.arguments = log, [str(argument) for argument in arguments]
        with log.open("ab") as file:
            self.process = subprocess.Popen([*COMMAND, *self.arguments], stdout=file, stderr=file, env=environment,
                                            cwd=log.parent)

    def wait(self, seconds: float = 200) -> int:
        code = self.process.wait(timeout=seconds)
        assert code == 0 or "expect" in self.arguments, self.log.read_text()[-3000:]
        return code

    def kill(self) -> None:
        """kill -9, by its id."""
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()


class Owner(Process):
    """A serving owner, on an address that it may be restarted at."""

    def __init__(self, folder: Path, model: Path, listen: str = "127.0.0.1:0", *more: object) -> None:
        (folder / "status.json").unlink(missing_ok=True)
        super().__init__(folder.parent / "owner.log", "owner", "serve", folder, "--model", model, "--cut", "1",
                         "--listen", listen, *more)
        self.address = wait_for(lambda: _address(folder / "status.json"), self)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=60)

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


def _address(path: Path) -> str | None:
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())["address"]
    return None


def wait_for(found: Any, process: Process, seconds: float = 120) -> Any:
    """What `found` gives once it gives something; the process has to live."""
    until = time.monotonic() + seconds
    while True:
        value = found()
        if value:
            return value
        assert process.process.poll() is None and time.monotonic() < until, process.log.read_text()[-3000:]
        time.sleep(0.05)


def delta_of(party: Path, which: str = "tuned") -> bytes:
    return (party / which / "delta" / "delta.safetensors").read_bytes()
