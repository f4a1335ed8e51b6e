"""The run folder: what may be written where, and the files that every run leaves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltaloom.errors import RefusedError, SettingsError, listed
from deltaloom.events import finite
from deltaloom.files import disk_errors, write_atomic

# What a run writes; --overwrite removes these and leaves anything else alone.
OWN = ("run.yaml", "environment.json", "events.jsonl", "metrics.json", "report.html", "delta", "checkpoints",
       "predictions.jsonl", "README.md", "tensorboard", "deltas.yaml")


def check_folder(path: Path, *, resume: bool, overwrite: bool, own: Sequence[str] = OWN, mark: str = "run.yaml") -> None:
    """Whether a run may write to the folder; nothing is written yet.

    `own` is what such runs write, `mark` the file that tells that one has.

    Raises:
        SettingsError: --resume together with --overwrite. RefusedError: the folder holds something and neither was given,
        or it cannot be written.
    """
    if resume and overwrite:
        raise SettingsError("--resume and --overwrite exclude each other")
    if path.exists() and not path.is_dir():
        raise RefusedError("the output is a file, not a folder", got=str(path), hint="Choose another output.")
    if path.is_dir() and any(path.iterdir()) and not resume:
        if not overwrite:
            raise RefusedError("the output folder is not empty", got=str(path),
                               hint="Go on with --resume, replace it with --overwrite, or choose another output.")
        foreign = [item.name for item in path.iterdir() if item.name not in own and not item.name.startswith(".")]
        if foreign and not (path / mark).exists():
            raise RefusedError("the output folder holds files that no run wrote", got=foreign[:5],
                               hint="--overwrite replaces earlier runs only; choose another output.")
    near = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not near.is_dir() or not os.access(near, os.W_OK):
        raise RefusedError("the output folder cannot be made there" if near != path else "the output folder cannot be written",
                           got=str(path), hint="Choose one that you may write to.")


def check_runs(paths: Sequence[Path]) -> None:
    """That each folder holds something of a run; an unfinished one is enough for a report.

    Raises:
        RefusedError: others; all of them.
    """
    strange = [str(path) for path in paths if path.is_dir() and not any((path / name).is_file() for name in OWN)]
    if strange:
        raise RefusedError("no run has written here", got=listed(strange), hint="Name the output folder of `deltaloom tune`.")


def clear_folder(path: Path, own: Sequence[str] = OWN) -> None:
    """Make the folder, without what an earlier run left; called when everything has been checked and training begins.

    Raises:
        ResourceError: no space.
    """
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    for name in own:
        item = path / name
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """One JSON object, indented, NaN as null."""
    write_atomic(path, json.dumps(finite(values), ensure_ascii=False, indent=1) + "\n")


def folder_bytes(path: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
