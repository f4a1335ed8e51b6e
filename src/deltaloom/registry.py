"""A folder as a registry: a name is a file of the folder; asking for it imports that file and nothing else."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import TypeVar

from deltaloom.errors import SettingsError, did_you_mean

T = TypeVar("T")


def names_in(package: str, skip: tuple[str, ...] = ("base",)) -> list[str]:
    """The names that a package's files define, sorted: `layer_norm.py` is `layer-norm`."""
    return names_of(Path(__file__).parent / package.removeprefix("deltaloom.").replace(".", "/"), skip)


def names_of(folder: Path, skip: tuple[str, ...] = ("base",)) -> list[str]:
    """The names that a folder's files define, sorted."""
    stems = (path.stem for path in folder.glob("*.py"))
    return sorted(stem.replace("_", "-") for stem in stems if not stem.startswith("_") and stem not in skip)


def class_named(package: str, name: str, base: type[T], what: str, skip: tuple[str, ...] = ("base",)) -> type[T]:
    """The class in `package` whose `name` is `name`, found by its file.

    Raises:
        SettingsError: no such file; names the legal ones and the nearest.
    """
    legal = names_in(package, skip)
    if name not in legal:
        raise SettingsError(f"unknown {what}", got=name, legal=legal, hint=did_you_mean(name, legal))
    module = importlib.import_module(f"{package}.{name.replace('-', '_')}")
    for value in vars(module).values():
        if inspect.isclass(value) and issubclass(value, base) and vars(value).get("name") == name:
            return value
    raise SettingsError(f"the file of the {what} '{name}' defines no class of that name", hint="This is a fault of deltaloom.")
