"""A front or a back as a folder of its own: what the owner gives to a party, and what it serves from.

    half.json               what the other half must agree with, see `cut.Half`
    config.json             the whole model's configuration
    model.safetensors       this half's tensors alone
    generation_config.json, tokenizer files     with a front
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig

from deltaloom.errors import CheckpointError, SettingsError
from deltaloom.files import atomic_folder
from deltaloom.models.load import AUTO_CLASSES
from deltaloom.models.quiet import quiet_transformers
from deltaloom.private.cut import TASKS, Half, Holder, Part, empty, fill, front_hash, halves_of
from deltaloom.settings import Settings

RECORD, WEIGHTS = "half.json", "model.safetensors"
MOST_BLOCKS = 4096
MOST_BYTES = 1 << 20  # of a JSON file


class HalfRecord(Settings):
    """What half.json holds."""

    version: int = Field(1, ge=1, le=1)
    """Of this format."""
    part: Part
    """front or back."""
    task: str
    """causal-lm or sequence-classification."""
    cut: int = Field(ge=1, lt=MOST_BLOCKS)
    """Blocks in the front."""
    head: Holder
    """Who holds the head."""
    tied: bool
    """The head's matrix is the table of tokens, so that the party has it."""
    fingerprint: str = Field(pattern=r"[0-9a-f]{64}")
    """Of the whole model's backbone."""
    front: str = Field("", pattern=r"([0-9a-f]{64})?")
    """The front's hash."""


def save_half(half: Half, folder: Path | str, tokenizer: Any = None, *, replace: bool = False) -> int:
    """Write one half, complete or not at all; gives back the bytes written.

    Raises:
        RefusedError: the folder is not empty and `replace` is off. ResourceError: no disk space.
    """
    record = HalfRecord(part=half.part, task=half.task, cut=half.cut, head=half.head, tied=half.tied,
                        fingerprint=half.fingerprint, front=half.front)
    folder = Path(folder)
    with atomic_folder(folder, replace=replace) as temporary, quiet_transformers():
        (temporary / RECORD).write_text(json.dumps(record.as_dict(), indent=2) + "\n", encoding="utf-8")
        half.config.save_pretrained(temporary)
        save_file(_unique(half), str(temporary / WEIGHTS), metadata={"format": "pt"})
        if half.part == "front" and half.task == "causal-lm":
            half.model.generation_config.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def load_half(folder: Path | str, part: Part | None = None) -> tuple[Half, Any]:
    """(half, tokenizer or None) of a folder; `part` says which half it has to be.

    Raises:
        CheckpointError: missing, damaged, tampered with, or the other half.
    """
    folder = Path(folder)
    record = _record(folder)
    if part is not None and record.part != part:
        raise CheckpointError("this folder holds the other half of the model", got=record.part, legal=part)
    with quiet_transformers():
        config = _config(folder)
        half = empty(config, _class(config, record.task), record.part, record.task, record.cut, record.head, record.tied,
                     record.fingerprint)
        fill(half, _tensors(folder, half))
        half = _checked(half, record, folder)
        if record.part == "front" and record.task == "causal-lm":
            half.model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        named = (folder / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False) if named else None
    return half, tokenizer


def _checked(half: Half, record: HalfRecord, folder: Path) -> Half:
    """The half with its front's hash; a front is held against what its record says."""
    found = front_hash(half.model, half.cut) if half.part == "front" else record.front
    if record.front not in ("", found):
        raise CheckpointError(f"the weights in {folder} are not those that its record names", got=found[:16],
                              legal=record.front[:16], hint="Ask the owner for the folder again.")
    return replace(half, front=found)


def _unique(half: Half) -> dict[str, Tensor]:
    """The half's tensors, each memory once; what was left out is tied again by `fill`."""
    found, seen = {}, set()
    for name, tensor in half.model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            found[name] = tensor.contiguous()
    return found


def _record(folder: Path) -> HalfRecord:
    try:
        values = json.loads(_read(folder / RECORD))
        record = HalfRecord.parse(values, RECORD)
    except (OSError, ValueError, SettingsError) as error:
        raise CheckpointError(f"{folder} is no half of a model", got=str(error).split("\n")[0],
                              hint="Ask the owner for the folder again.") from None
    if record.task not in TASKS:
        raise CheckpointError("this half is for a task that cannot be cut", got=record.task, legal=TASKS)
    return record


def _read(path: Path) -> str:
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path.name} is larger than {MOST_BYTES} bytes")
    return path.read_text(encoding="utf-8")


def _config(folder: Path) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the configuration in {folder} cannot be read", got=str(error).split("\n")[0]) from None
    if not 2 <= int(config.num_hidden_layers) <= MOST_BLOCKS:
        raise CheckpointError("a model that can be cut has at least two blocks", got=config.num_hidden_layers)
    halves_of(config)
    return config


def _class(config: PreTrainedConfig, task: str) -> Any:
    known = AUTO_CLASSES[task]._model_mapping
    if type(config) not in known:
        raise CheckpointError(f"transformers has no {task} model of this architecture", got=config.model_type)
    return known[type(config)]


def _tensors(folder: Path, half: Half) -> dict[str, Tensor]:
    """The stored tensors, which must be exactly those that the half has places for."""
    try:
        found = load_file(str(folder / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the weights in {folder} cannot be read", got=str(error).split("\n")[0]) from None
    wanted = {name: tuple(tensor.shape) for name, tensor in half.model.state_dict().items()}
    if half.part == "front" and half.tied and half.has_head:
        names = {id(module): name for name, module in half.model.named_modules()}
        output, tokens = (f"{names[id(module)]}.weight" for module in
                          (half.model.get_output_embeddings(), half.model.get_input_embeddings()))
        kept = found.get(tokens, found.get(output))
        if kept is not None:
            found[tokens] = found[output] = kept
    problems = [f"missing: {name}" for name in wanted if name not in found]
    problems += [f"stray: {name}" for name in found if name not in wanted]
    problems += [f"shape of {name}: {tuple(found[name].shape)}, must be {shape}" for name, shape in wanted.items()
                 if name in found and tuple(found[name].shape) != shape]
    if problems:
        raise CheckpointError(f"the weights in {folder} are not those of this {half.part}", problems=problems[:20])
    return found
