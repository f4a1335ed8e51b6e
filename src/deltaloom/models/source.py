"""What a `model:` value names: a bundled model, a folder, a GGUF file or a hub id; checked before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from deltaloom.errors import CheckpointError, SettingsError
from deltaloom.models.bundled import bundled_path
from deltaloom.models.files import check_folder

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
BUNDLED = "bundled:"


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a local folder, a GGUF file, or (neither) an id on the hub with its revision."""

    name: str  # as the user wrote it
    folder: Path | None = None
    gguf: Path | None = None
    hub_id: str | None = None
    revision: str | None = None

    @property
    def location(self) -> str:
        """The first argument of `from_pretrained`."""
        if self.gguf:
            return str(self.gguf.parent)
        return str(self.folder) if self.folder else str(self.hub_id)


def parse_source(name: str | Path) -> Source:
    """The source that a `model:` value names; folders and files are looked at, the hub is not asked.

    Raises:
        CheckpointError: it is local and missing or damaged, or a bundled model that is not in the cache.
        SettingsError: it can be neither a path nor a hub id.
    """
    text = str(name)
    if text.startswith(BUNDLED):
        return _folder(text, bundled_path(text.removeprefix(BUNDLED)))
    path = Path(text).expanduser()
    if path.is_dir():
        return _folder(text, path)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise CheckpointError("there is no such GGUF file", got=text)
        return Source(text, gguf=path.absolute())
    if path.is_file():
        raise CheckpointError("a model is a folder, a .gguf file, a hub id or bundled:NAME", got=text,
                              hint="For a safetensors file name the folder that holds it and its config.json.")
    if isinstance(name, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise CheckpointError("there is no such model folder", got=text)
    if not HUB_ID.fullmatch(text):
        raise SettingsError("model is neither a path nor a hub id", got=text,
                            legal=["org/name", "org/name@revision", "a folder", "a .gguf file", "bundled:NAME"])
    hub_id, _, revision = text.partition("@")
    return Source(text, hub_id=hub_id, revision=revision or None)


def _folder(name: str, path: Path) -> Source:
    check_folder(path)
    return Source(name, folder=path)
