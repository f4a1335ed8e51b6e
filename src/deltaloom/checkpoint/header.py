"""The header of a safetensors file, read and checked without torch, and before anything is allocated.

The file is: 8 bytes with the header's length (little-endian), a JSON object, the tensors' bytes. It comes from outside: every
number in it is compared with the file's size before it is used.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from deltaloom.errors import CheckpointError

if TYPE_CHECKING:
    import numpy

MOST_HEADER_BYTES = 32 * 2 ** 20   # a delta of 100 000 tensors takes 15 MiB
MOST_JSON_BYTES = 64 * 2 ** 20     # of a JSON file beside it
MOST_DIMENSIONS = 8
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"}
AGAIN = "The file is damaged or was cut off: copy or save it again."


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: safetensors' name of its type, its shape, and where its bytes lie (from the file's start)."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself; `tensors` in the order of the file's header."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    file_bytes: int


def read_header(path: Path) -> Header:
    """The checked header of a safetensors file.

    Raises:
        CheckpointError: no such file, a damaged or truncated one, tensors that overlap or leave holes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
            if not 2 <= length <= min(size - 8, MOST_HEADER_BYTES):
                _damaged(path, f"its header cannot have {length} bytes in a file of {size}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}", got=str(path)) from None
    record = parse_json(raw, path)
    metadata = record.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _damaged(path, "its metadata are no texts")
    tensors = {name: _tensor_info(path, name, entry, 8 + length, size) for name, entry in record.items()}
    _check_layout(path, tensors, 8 + length, size)
    return Header(tensors, metadata, size)


def parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """A JSON object from outside: no duplicate keys, no NaN, not nested without end.

    Raises:
        CheckpointError: anything else.
    """
    try:
        record = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} does not hold legal JSON: {str(error)[:200]}", got=str(path), hint=AGAIN) from None
    if not isinstance(record, dict):
        _damaged(path, "it holds no JSON object")
    return record


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file of bounded size.

    Raises:
        CheckpointError: no such file, too large a one, or not a JSON object.
    """
    try:
        size = path.stat().st_size
        if size > MOST_JSON_BYTES:
            raise CheckpointError(f"{path.name} is too large to be what its name says", got=f"{size} bytes",
                                  legal=f"up to {MOST_JSON_BYTES}")
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}", got=str(path)) from None


def read_values(path: Path, info: TensorInfo) -> numpy.ndarray:
    """One tensor of a file as numpy's float32, float64 or integers (bfloat16 is widened)."""
    import numpy

    with path.open("rb") as file:
        file.seek(info.start)
        raw = file.read(info.stop - info.start)
    if info.dtype == "BF16":
        wide = numpy.frombuffer(raw, dtype="<u2").astype(numpy.uint32) << 16
        return wide.view(numpy.float32).reshape(info.shape)
    return numpy.frombuffer(raw, dtype=_NUMPY[info.dtype]).reshape(info.shape)


def _tensor_info(path: Path, name: str, entry: object, data: int, size: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _damaged(path, f"the entry of '{name[:80]}' is not one of a tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        _damaged(path, f"'{name[:80]}' has the type {str(dtype)[:40]!r}")
    if not _naturals(shape) or len(shape) > MOST_DIMENSIONS or not _naturals(offsets) or len(offsets) != 2:
        _damaged(path, f"'{name[:80]}' has no legal shape or place")
    start, stop = offsets
    if start > stop or stop > size - data or stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        _damaged(path, f"'{name[:80]}' of shape {tuple(shape)} does not lie in the file's {size} bytes as it says")
    return TensorInfo(dtype, tuple(shape), data + start, data + stop)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
        if info.start != start:
            _damaged(path, "its tensors overlap or leave holes")
        start = info.stop
    if start != size:
        _damaged(path, f"it has {size} bytes and its tensors end at {start}")


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2 ** 62 for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key comes twice")
    return record


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _damaged(path: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{path.name} is not a whole safetensors file: {what}" if path.suffix == ".safetensors"
                          else f"{path.name} is damaged: {what}", got=str(path), hint=AGAIN)
