"""Writing that is complete or absent: a file or a folder appears under its name only when every byte is on the disk."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deltaloom.errors import RefusedError, ResourceError


def write_atomic(path: Path, content: str | bytes, *, mode: int = 0o644) -> Path:
    """Write a file through a temporary one in the same folder; nobody but its owner can read it before it has its `mode`.

    Raises:
        ResourceError: the disk is full; an earlier file of that name is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(mode)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return path


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` to fill; it takes the name `path` at the end of the block, or vanishes on an error.

    Raises:
        RefusedError: `path` exists, is not empty, and `replace` is off. ResourceError: the disk is full.
    """
    check_new(path, replace=replace)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
        try:
            temporary.chmod(0o755)
            yield temporary
            for file in temporary.rglob("*"):
                sync(file)
            sync(temporary)
            if path.exists():
                _swap(temporary, path)
            else:
                temporary.rename(path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def check_new(path: Path, *, replace: bool = False) -> None:
    """Refuse to write over a file or a folder that holds something."""
    if path.is_file():
        raise RefusedError("a file stands where a folder is to be written", got=str(path), hint="Choose another output.")
    if path.is_dir() and any(path.iterdir()) and not replace:
        raise RefusedError("the output folder is not empty", got=str(path), hint="Choose another one, or remove it first.")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn 'no space left' into a ResourceError that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(f"no space is left to write {path.name}",
                            hint="Free some space and run again; earlier files are whole.") from None


def sync(path: Path) -> None:
    """Force a file's or folder's bytes to the disk, where the system can."""
    with suppress(PermissionError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(new: Path, old: Path) -> None:
    aside = Path(tempfile.mkdtemp(dir=old.parent, prefix=f".{old.name}.", suffix=".old"))
    old.rename(aside / "old")
    new.rename(old)
    shutil.rmtree(aside, ignore_errors=True)
