"""deltaloom as a library: the few functions that a user's own program calls."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from torch import nn

from deltaloom.checkpoint.native import save
from deltaloom.checkpoint.peft import load_any
from deltaloom.deltas.base import Method, methods_from
from deltaloom.deltas.presets import KEY
from deltaloom.jobs.opening import delta_folder
from deltaloom.jobs.runfile import parse_run, read_run_file
from deltaloom.jobs.tune import tune as tune_job
from deltaloom.registry import names_in
from deltaloom.stacks import register_site
from deltaloom.train.hf import trainer_callback
from deltaloom.tuned import Tuned, attach, settle

__all__ = ["attach", "load", "method_named", "preset", "register_site", "save", "settle", "trainer_callback", "tune"]


def load(model: nn.Module, folder: Path | str, name: str = "default") -> Tuned:
    """Put a saved delta on its base: a run folder, a native or a PEFT delta folder. A tuned model gets it as a further delta.

    Raises:
        CheckpointError: missing, damaged, or of another base; nothing has changed.
    """
    return load_any(model, delta_folder(folder) or Path(folder), name)


def tune(run: Path | str | dict[str, Any], *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """The command `deltaloom tune` as a function: a run file, or the mapping that one holds; gives back its metrics.

    Raises:
        DeltaloomError: of the kind that says what happened.
    """
    parsed = parse_run(run, base=Path.cwd()) if isinstance(run, dict) else read_run_file(Path(run))
    return tune_job(parsed, resume=resume, overwrite=overwrite)


def preset(name: str, settings: dict[str, dict[str, Any]] | None = None) -> list[Method]:
    """The methods of a preset, in order; `settings` holds other settings by the names of its methods.

    Raises:
        SettingsError: no such preset, or settings that its methods do not have.
    """
    return list(methods_from([{KEY: name, **(settings or {})}], "preset"))


def method_named(class_name: str) -> type[Method]:
    """The settings class of that name among the method files.

    Raises:
        AttributeError: there is none.
    """
    for name in names_in("deltaloom.deltas"):
        module = importlib.import_module(f"deltaloom.deltas.{name.replace('-', '_')}")
        found = vars(module).get(class_name)
        if inspect.isclass(found) and issubclass(found, Method) and "name" in vars(found):
            return found
    raise AttributeError(f"module 'deltaloom' has no attribute '{class_name}'")
