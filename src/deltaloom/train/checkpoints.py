"""Checkpoints: `step-N/` folders that hold everything to go on bit for bit, whole or absent.

A folder has `state.json` (numbers and structure), one safetensors file for each part that has tensors, and
`manifest.json` with the sha256 of every other file. A folder whose files do not fit its manifest is never used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltaloom.errors import CheckpointError, DeltaloomError, ResourceError
from deltaloom.events import Emitter, Warned
from deltaloom.files import atomic_folder, disk_errors
from deltaloom.train.state import pack, unpack

STEP = re.compile(r"step-(\d+)")
LEFTOVER = re.compile(r"\.step-\d+\..*\.(part|old)")
MANIFEST, STATE = "manifest.json", "state.json"
FORMAT = 1
SPARE = 16 << 20  # bytes that stay free beyond the checkpoint: logs and reports go to the same disk


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified: its folder, its step, and its parts by name."""

    path: Path
    step: int
    parts: dict[str, Any]

    def rewind(self, log: Path) -> int:
        """Cut from an event log what was written after this checkpoint; returns the bytes cut. Call before opening the log."""
        position = self.parts["progress"]["log_bytes"]
        size = log.stat().st_size if log.exists() else 0
        if size <= position:
            return 0
        with log.open("r+b") as file:
            file.truncate(position)
        return size - position


def write_checkpoint(folder: Path, step: int, parts: Mapping[str, Any]) -> Path:
    """Write `folder/step-N`; a folder of that name that exists is replaced.

    Raises:
        ResourceError: the disk has no room; earlier checkpoints are untouched.
    """
    path = folder / f"step-{step}"
    files: dict[str, dict[str, Tensor]] = {}
    state = {}
    for name, part in parts.items():
        tensors: dict[str, Tensor] = {}
        state[name] = pack(part, "", tensors)
        if tensors:
            files[f"{name}.safetensors"] = _unshared(tensors)
    _check_space(folder, sum(t.numel() * t.element_size() for tensors in files.values() for t in tensors.values()))
    with disk_errors(path), atomic_folder(path, replace=True) as temporary:
        for name, tensors in files.items():
            _save_tensors(tensors, temporary / name)
        (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
        manifest = {"format": FORMAT, "step": step, "sha256": {file.name: _sha256(file) for file in sorted(temporary.iterdir())}}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return path


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one `step-N` folder.

    Raises:
        CheckpointError: a file is missing, cut or changed, or the folder is of a newer version of deltaloom.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, hashes, step = manifest["format"], dict(manifest["sha256"]), int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint has no readable {MANIFEST} ({type(error).__name__})", got=str(path)) from None
    if version != FORMAT:
        raise CheckpointError("the checkpoint is of another version of deltaloom", got=version, legal=FORMAT)
    present = {file.name for file in path.iterdir()} - {MANIFEST}
    problems = [f"missing: {name}" for name in hashes if name not in present]
    problems += [f"unexpected: {name}" for name in sorted(present - set(hashes))]
    problems += [f"changed or cut: {name}" for name in hashes if name in present and _sha256(path / name) != hashes[name]]
    if problems:
        raise CheckpointError("the checkpoint is damaged", got=str(path), problems=problems)
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    tensors = {name: load_file(path / f"{name}.safetensors") for name in state if f"{name}.safetensors" in hashes}
    return Checkpoint(path, step, {name: unpack(part, tensors.get(name, {})) for name, part in state.items()})


def latest_checkpoint(folder: Path, emit: Emitter) -> Checkpoint | None:
    """The newest whole checkpoint of a folder, or None; damaged ones are passed over, each with a warning."""
    for step, path in reversed(checkpoints(folder)):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            emit(Warned(kind="damaged-checkpoint", message=f"step-{step} is passed over: {error}"))
    return None


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint by its name, oldest first; whether they are whole is not looked at."""
    if not folder.is_dir():
        return []
    found = [(STEP.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def prune_checkpoints(folder: Path, keep: int, also: Iterable[int | None] = ()) -> None:
    """Delete all but the newest `keep` checkpoints and those of the steps in `also`."""
    found = checkpoints(folder)
    kept = {step for step, _ in found[-keep:]} | set(also)
    for step, path in found:
        if step not in kept:
            aside = path.with_name(f".{path.name}.pruned.old")  # renamed first: a cut deletion leaves no half checkpoint
            path.rename(aside)
            shutil.rmtree(aside)


def remove_leftovers(folder: Path, emit: Emitter) -> None:
    """Delete temporary folders that a killed process left behind."""
    found = [path for path in folder.iterdir() if LEFTOVER.fullmatch(path.name)] if folder.is_dir() else []
    for path in found:
        shutil.rmtree(path)
    if found:
        emit(Warned(kind="cut-checkpoint", message="a killed run left unfinished checkpoints; deleted", count=len(found)))


def _check_space(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE:
        raise ResourceError("no disk space for a checkpoint", got=f"{free / 1e6:.1f} MB free",
                            legal=f"at least {(needed + SPARE) / 1e6:.1f} MB",
                            hint="Earlier checkpoints are whole: free some space and resume, or set keep_checkpoints lower.")


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, none sharing memory with another (safetensors refuses that)."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        found[name] = plain.clone() if storage in seen else plain
        seen.add(storage)
    return found


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # its writer does not raise OSError
        if "os error 28" in str(error) or "os error 122" in str(error):
            raise OSError(errno.ENOSPC, str(error)) from None
        raise DeltaloomError(f"{path.name} could not be written: {error}") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
