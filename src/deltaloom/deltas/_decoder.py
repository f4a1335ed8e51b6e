"""Decoders of prompts: a mean prompt and directions that its rows move in, learned once and shared by many deltas.

    rows = mean + z directions,     z (length, k)

A folder with decoder.json (what it is, which backbone it belongs to, the tensors' sha256) and decoder.safetensors.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from deltaloom.errors import CheckpointError, SettingsError
from deltaloom.files import atomic_folder
from deltaloom.settings import Settings

RECORD, TENSORS = "decoder.json", "decoder.safetensors"
MOST_BYTES = 1 << 30
AGAIN = "Learn it again with `deltaloom subspace learn`, or copy both files again."


class DecoderRecord(Settings):
    """What decoder.json says."""

    format: str = Field("deltaloom-decoder", pattern="^deltaloom-decoder$")
    version: int = Field(1, ge=1, le=1)
    fingerprint: str = Field(min_length=64, max_length=64)
    length: int = Field(ge=1)
    width: int = Field(ge=1)
    directions: int = Field(ge=1)
    sha256: str = Field(min_length=64, max_length=64)
    runs: tuple[str, ...] = ()
    explained: float = 0.0     # share of the variance of the learned prompts' rows
    about: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Decoder:
    """A decoder as it is used: mean (length, width), directions (k, width), both float32."""

    record: DecoderRecord
    mean: Tensor
    directions: Tensor


def write_decoder(folder: Path, mean: Tensor, directions: Tensor, *, fingerprint: str, runs: tuple[str, ...],
                  explained: float) -> DecoderRecord:
    """Write the folder, complete or not at all.

    Raises:
        RefusedError: it is not empty. ResourceError: the disk is full.
    """
    blob = to_bytes({"mean": mean.float().contiguous(), "directions": directions.float().contiguous()})
    record = DecoderRecord(fingerprint=fingerprint, length=mean.shape[0], width=mean.shape[1], directions=directions.shape[0],
                           sha256=hashlib.sha256(blob).hexdigest(), runs=runs, explained=explained)
    with atomic_folder(folder) as temporary:
        (temporary / TENSORS).write_bytes(blob)
        (temporary / RECORD).write_text(json.dumps(record.as_dict(), indent=1) + "\n", encoding="utf-8")
    return record


def read_record(folder: Path) -> DecoderRecord:
    """The checked decoder.json.

    Raises:
        CheckpointError: there is none, or it is not one.
    """
    path = folder / RECORD
    if not path.is_file() or path.stat().st_size > 1 << 20:
        raise CheckpointError("there is no decoder of prompts", got=str(folder), legal=f"a folder with {RECORD}",
                              hint="`deltaloom subspace learn RUN RUN ... -o FOLDER` makes one.")
    try:
        return DecoderRecord.parse(json.loads(path.read_text(encoding="utf-8")), RECORD)
    except SettingsError as error:
        raise CheckpointError(f"{RECORD} is not a record of a decoder: {error}", got=str(folder), hint=AGAIN) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{RECORD} is no legal JSON: {str(error)[:200]}", got=str(folder), hint=AGAIN) from None


def read_decoder(folder: Path) -> Decoder:
    """A decoder, every byte checked.

    Raises:
        CheckpointError: a file is missing, damaged or changed, or the values are not what the record says.
    """
    record, path = read_record(folder), folder / TENSORS
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise CheckpointError(f"the decoder has no {TENSORS}", got=str(folder), hint=AGAIN)
    blob = path.read_bytes()
    if hashlib.sha256(blob).hexdigest() != record.sha256:
        raise CheckpointError(f"{TENSORS} is not the file that {RECORD} was written with", got=str(folder), hint=AGAIN)
    try:
        tensors = from_bytes(blob)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{TENSORS} cannot be read: {error}", got=str(folder), hint=AGAIN) from None
    shapes = {"mean": (record.length, record.width), "directions": (record.directions, record.width)}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes or not all(
            tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise CheckpointError(f"{TENSORS} does not hold what {RECORD} says", got=str(folder), hint=AGAIN)
    return Decoder(record, tensors["mean"], tensors["directions"])
