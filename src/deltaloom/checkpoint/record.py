"""`delta.json`, the record beside a saved delta's tensors; and a delta's facts from both files, without torch.

    delta.json          which base, which methods at which sites, what the tensors' file is, facts of each site
    delta.safetensors   the tensors, named `method index:site:name`
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deltaloom.checkpoint.header import AGAIN, Header, read_header, read_json
from deltaloom.errors import CheckpointError
from deltaloom.settings import settings_error

RECORD = "delta.json"
TENSORS = "delta.safetensors"
VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class BaseRecord(_Part):
    """Which model a delta belongs to, and for which task."""

    source: str | None = None        # as it was given: a hub id, `bundled:NAME`, a folder
    commit: str | None = None
    fingerprint: str = Field(max_length=200)
    architecture: str | None = None
    task: str | None = None
    labels: list[str] | None = None
    quantised: str | None = None     # how its linears were stored: a codec's name, or "compact"; None: dense
    quantise: str | None = None      # the codec that they were quantised with when the base was loaded


class MethodRecord(_Part):
    """One method: its settings, its sites by name, whether the task added it for a head."""

    settings: dict[str, Any]
    sites: list[str]
    head: bool = False


class SiteFacts(_Part):
    """What `inspect` shows of one delta. With those of the shared modules the parameters sum up to the delta's."""

    site: str
    method: int
    layer: int | None = None
    parameters: int = 0              # its own; a parameter that several sites share is counted at the first one
    rank: int | None = None          # of a low-rank change
    norm: float | None = None        # Frobenius norm of the change of the weight, where there is one
    singular: list[float] | None = None  # singular values of a low-rank change, largest first


class SharedFacts(_Part):
    """A module that several deltas of one method read, by the method's name for it."""

    name: str
    method: int
    parameters: int = 0


class GroupFacts(_Part):
    """The layers whose sites have one role and one shape, under one method."""

    role: str
    shape: tuple[int, int]           # (d_out, d_in)
    method: int = Field(0, ge=0)
    layers: int = Field(ge=1)        # how many changes are compared
    rho: float | None = None         # 1 / layers: the layers' changes are orthogonal to one another; 1: the same up to a factor
    ranks: list[int] | None = None   # of low-rank changes, from the first layer to the last
    residual: float | None = None    # largest deviation from orthonormal columns of the factors that are kept orthonormal


class TensorsRecord(_Part):
    """The tensors' file: its name, size and sha256, and tensors that are saved under another name already."""

    file: str = TENSORS
    bytes: int
    sha256: str = Field(min_length=64, max_length=64)
    same: dict[str, str] = Field(default_factory=dict)


class DeltaRecord(_Part):
    """The whole of delta.json."""

    format: Literal["deltaloom-delta"] = "deltaloom-delta"
    version: int = VERSION
    deltaloom: str
    base: BaseRecord
    methods: list[MethodRecord] = Field(min_length=1)
    seed: int | None = None
    tensors: TensorsRecord
    sites: list[SiteFacts] = Field(default_factory=list)
    shared: list[SharedFacts] = Field(default_factory=list)
    groups: list[GroupFacts] = Field(default_factory=list)
    data: dict[str, Any] | None = None


@dataclass(frozen=True)
class DeltaFacts:
    """A saved delta without its values."""

    record: DeltaRecord
    header: Header
    bytes: int       # of both files

    @property
    def parameters(self) -> int:
        """Elements of all saved tensors of numbers; those that several deltas share once. Masks and indices do not count."""
        return sum(info.elements for info in self.header.tensors.values() if info.dtype.startswith(("F", "BF")))


def read_record(folder: Path) -> DeltaRecord:
    """The checked delta.json of a folder.

    Raises:
        CheckpointError: no such file, damaged, or of a later version of deltaloom.
    """
    path = folder / RECORD
    if not path.is_file():
        raise CheckpointError(f"the folder holds no {RECORD}", got=str(folder),
                              hint="A delta's folder has delta.json and delta.safetensors; a run's lies in its delta/ folder.")
    values = read_json(path)
    version = values.get("version")
    if type(version) is int and version > VERSION:
        raise CheckpointError("this delta was saved by a later deltaloom", got=f"format {version}, deltaloom "
                              f"{str(values.get('deltaloom'))[:40]}", legal=f"format {VERSION}", hint="Update deltaloom.")
    try:
        record = DeltaRecord.model_validate(values)
    except ValidationError as error:
        problems = settings_error(DeltaRecord, error, RECORD)
        raise CheckpointError(f"{RECORD} is not a record of a delta", got=str(folder), hint=AGAIN,
                              problems=problems.problems or [str(problems)]) from None
    if record.version != VERSION or record.tensors.file != TENSORS:
        raise CheckpointError(f"{RECORD} is not a record of a delta",
                              got=f"version {record.version}, file {record.tensors.file!r}",
                              legal=f"version {VERSION}, file {TENSORS}")
    return record


def delta_file_facts(folder: Path) -> DeltaFacts:
    """What a saved delta is, from its record and its tensors' header alone: neither torch nor the base is needed.

    Raises:
        CheckpointError: a file is missing or damaged. Values are not read: `check_hash` does.
    """
    record = read_record(folder)
    path = folder / TENSORS
    if not path.is_file():
        raise CheckpointError(f"the folder holds {RECORD} and no {TENSORS}", got=str(folder), hint=AGAIN)
    header = read_header(path)
    if header.file_bytes != record.tensors.bytes:
        raise CheckpointError(f"{TENSORS} has another size than {RECORD} says", got=f"{header.file_bytes} bytes",
                              legal=f"{record.tensors.bytes} bytes", hint=AGAIN)
    return DeltaFacts(record, header, header.file_bytes + (folder / RECORD).stat().st_size)


def check_hash(folder: Path, record: DeltaRecord) -> None:
    """Compare the tensors' file with its sha256.

    Raises:
        CheckpointError: it was changed after saving.
    """
    with (folder / TENSORS).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != record.tensors.sha256:
        raise CheckpointError(f"{TENSORS} is not the file that was saved: its sha256 differs", got=found,
                              legal=record.tensors.sha256, hint=AGAIN)
