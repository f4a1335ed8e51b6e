"""Checks of a model's folder before anything is loaded from it: the files that are there, and that none is cut short."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from deltaloom.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Bytes of an element; the names are those of the safetensors format.
BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
         "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}
LARGEST_HEADER = 100_000_000  # the format's own limit


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be loaded completely; reads headers only.

    Raises:
        CheckpointError: no config.json, no safetensors (pickles are never read), a damaged or missing shard (all at once).
    """
    read_json(folder / "config.json")
    if (folder / SINGLE).is_file():
        problems = _problems_of(folder / SINGLE)
    elif (folder / INDEX).is_file():
        problems = _shard_problems(folder)
    else:
        raise _no_weights(folder)
    if problems:
        raise CheckpointError(f"the weights in {folder} are damaged", problems=problems,
                              hint="Copy or download the named files again.")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = sorted(item.name for item in path.parent.iterdir()) if path.parent.is_dir() else []
        raise CheckpointError(f"{path.parent} has no {path.name}, so it is not a model folder",
                              legal=None, hint=f"It holds: {', '.join(found[:10]) or 'nothing'}.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON", got=str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object", got=type(value).__name__)
    return value


def read_header(path: Path) -> dict[str, Any]:
    """The checked header of a safetensors file: tensor name -> {dtype, shape, data_offsets}.

    Raises:
        CheckpointError: the header is damaged, or the file is shorter or longer than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            raise CheckpointError(f"{path.name}: its header should take {length} bytes, the file has {size}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path.name}: its header is damaged", got=str(error)) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: its header is damaged", got=type(header).__name__)
    header.pop("__metadata__", None)
    end = _checked_end(path.name, header)
    if 8 + length + end != size:
        raise CheckpointError(f"{path.name}: {size} bytes, but its header describes {8 + length + end}")
    return header


def _checked_end(file: str, header: dict[str, Any]) -> int:
    """Where the last tensor ends; tensors must lie one after the other without gaps, each as long as its shape says."""
    spans = []
    for name, entry in header.items():
        try:
            start, stop = entry["data_offsets"]
            wanted = math.prod(entry["shape"]) * BYTES.get(entry["dtype"], 0)
            fits = stop - start == wanted or entry["dtype"] not in BYTES
            spans.append((start, stop))
        except (TypeError, KeyError, ValueError):
            fits = False
        if not fits:
            raise CheckpointError(f"{file}: its header is damaged at tensor '{name}'")
    end = 0
    for start, stop in sorted(spans):
        if start != end or stop < start:
            raise CheckpointError(f"{file}: its header is damaged, tensors overlap or leave a gap at byte {start}")
        end = stop
    return end


def _problems_of(path: Path) -> list[str]:
    try:
        read_header(path)
    except CheckpointError as error:
        return [str(error)]
    return []


def _shard_problems(folder: Path) -> list[str]:
    weights = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        return [f"{INDEX} has no weight_map"]
    problems = []
    for shard in sorted({str(name) for name in weights.values()}):
        path = folder / shard
        if os.path.basename(shard) != shard or not shard.endswith(".safetensors"):  # noqa: PTH119
            problems.append(f"{INDEX} names '{shard}', which is not a safetensors file of this folder")
        elif not path.is_file():
            problems.append(f"{shard} is missing")
        elif found := _problems_of(path):
            problems += found
        else:
            absent = {name for name, home in weights.items() if home == shard} - set(read_header(path))
            problems += [f"{shard} lacks tensor '{name}'" for name in sorted(absent)[:3]]
    return problems


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(item.name for item in folder.iterdir() if item.suffix in PICKLES)
    if pickles:
        return CheckpointError(f"{folder} has its weights only as pickles, which can run code and are never read",
                               got=", ".join(pickles), legal=[SINGLE, INDEX],
                               hint="Convert them with a tool you trust, or take a copy with safetensors.")
    return CheckpointError(f"{folder} has no weights", legal=[SINGLE, INDEX, "a .gguf file named directly"])
