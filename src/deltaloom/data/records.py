"""Records: the rows of a file as plain mappings, each with the place it came from; every problem of a file is reported at once.

A file is outside bytes: whatever it holds, reading it either gives records or raises DataError.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaloom.errors import DataError, did_you_mean

MAX_LINE = 10_000_000  # bytes; a longer line is no row of text but a mistake
MAX_JSON = 1_000_000_000  # bytes; a .json file is held in memory whole
MAX_LISTED = 20


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file; `where` is `file:line` for lines of text, `file row n` otherwise (n from 1)."""

    where: str
    fields: dict[str, Any]


class Problems:
    """Collects what is wrong with rows, so that one error can name it all."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def __len__(self) -> int:
        return len(self._found)

    def add(self, where: str, what: str) -> None:
        """Note a problem at a place."""
        self._found.append(f"{where}: {what}")

    def check(self, what: str, hint: str | None = None) -> None:
        """Raise DataError if anything was noted: the first 20 places and the total count."""
        if self._found:
            shown = self._found[:MAX_LISTED]
            if len(self._found) > MAX_LISTED:
                shown.append(f"... and {len(self._found) - MAX_LISTED} more")
            raise DataError(f"{what}: {_count(len(self._found), 'problem')}", hint=hint, problems=shown)


def read_records(path: Path, problems: Problems, name: str | None = None, limit: int | None = None) -> list[Record]:
    """The records of one jsonl, json, csv, tsv or parquet file, at most `limit`.

    `name` is how places are named (default: the path as given). Bad rows go to `problems` and are left out.

    Raises:
        DataError: the file is missing, empty, a folder, of an unknown kind, or is not text.
    """
    name = name or str(path)
    reader = _reader(path, name)
    records: list[Record] = []
    before = len(problems)
    try:
        for record in reader(path, name, problems):
            records.append(record)
            if limit is not None and len(records) >= limit:
                break
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}") from None
    if not records and len(problems) == before:
        raise DataError(f"{name} holds no rows", hint="Check that it is the right file.")
    return records


def _reader(path: Path, name: str) -> Callable[[Path, str, Problems], Iterator[Record]]:
    if path.is_dir():
        raise DataError(f"{name} is a folder", hint="Name the files in it; only images may be given as a folder (format: image).")
    if not path.is_file():
        neighbours = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        where = "" if path.parent.is_dir() else f"The folder {path.parent} does not exist either. "
        raise DataError(f"no such file: {name}", hint=(where + did_you_mean(path.name, neighbours)).strip()
                        or "Relative paths start at the run file's folder.")
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataError(f"{name}: unknown kind of file", got=suffix or "no extension", legal=sorted(READERS),
                        hint="Convert it to JSON lines, or rename it if only its name is wrong.")
    if path.stat().st_size == 0:
        raise DataError(f"{name} is empty", hint="Check that whatever wrote it has finished.")
    return READERS[suffix]


def _lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file with their ends; a byte order mark is dropped."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE + 1):
            number += 1
            if number == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise DataError(f"{name} is UTF-16 text", hint="Save it as UTF-8.")
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if b"\0" in raw:
                raise DataError(f"{name}:{number}: not a text file (it holds NUL bytes)", hint="Is the extension right?")
            if len(raw) > MAX_LINE:
                raise DataError(f"{name}:{number}: a line of more than {MAX_LINE // 1_000_000} MB",
                                hint="Split the row; is this one JSON value that belongs into a .json file?")
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{name}:{number}: not UTF-8 (byte {raw[error.start]:#04x} at position {error.start})",
                                hint="Save the file as UTF-8, for example with: iconv -f latin1 -t utf-8") from None


def _json_lines(path: Path, name: str, problems: Problems) -> Iterator[Record]:
    for number, line in _lines(path, name):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problems.add(where, f"invalid JSON: {error.msg} at character {error.colno}")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nesting without end
            problems.add(where, f"JSON that cannot be read: {str(error)[:80]}")
        else:
            if isinstance(value, dict):
                yield Record(where, value)
            else:
                problems.add(where, f"not a JSON object but {_kind(value)}")


def _json(path: Path, name: str, problems: Problems) -> Iterator[Record]:
    if path.stat().st_size > MAX_JSON:
        raise DataError(f"{name} has more than {MAX_JSON // 1_000_000_000} GB",
                        hint="Convert it to JSON lines, which is read row by row.")
    text = _decoded(path, name)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        lines = "It looks like JSON lines: rename it to .jsonl." if error.msg == "Extra data" and error.lineno > 1 else None
        raise DataError(f"{name}:{error.lineno}: invalid JSON: {error.msg} at character {error.colno}", hint=lines) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: JSON that cannot be read: {str(error)[:80]}") from None
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise DataError(f"{name}: the file must hold a list of objects", got=_kind(value),
                        legal='[{...}, ...] or {"data": [...]}')
    for number, row in enumerate(rows, 1):
        where = f"{name} row {number}"
        if isinstance(row, dict):
            yield Record(where, row)
        else:
            problems.add(where, f"not a JSON object but {_kind(row)}")


def _decoded(path: Path, name: str) -> str:
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name} is UTF-16 text", hint="Save it as UTF-8.")
    if b"\0" in raw:
        raise DataError(f"{name}: not a text file (it holds NUL bytes)", hint="Is the extension right?")
    try:
        return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not UTF-8 (byte {raw[error.start]:#04x})", hint="Save the file as UTF-8.") from None


def _comma(path: Path, name: str, problems: Problems) -> Iterator[Record]:
    return _table(path, name, problems, ",")


def _tab(path: Path, name: str, problems: Problems) -> Iterator[Record]:
    return _table(path, name, problems, "\t")


def _table(path: Path, name: str, problems: Problems, delimiter: str) -> Iterator[Record]:
    """Rows below a header row; every value is a string."""
    before = csv.field_size_limit(MAX_LINE)  # a setting of the whole process: put back below
    try:
        reader = csv.reader((line for _, line in _lines(path, name)), delimiter=delimiter, strict=True)
        header: list[str] = []
        start = 1  # a quoted field may span lines: the row is named by its first one
        for row in reader:
            where, start = f"{name}:{start}", reader.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header = _header(row, name, delimiter)
            elif len(row) != len(header):
                problems.add(where, f"{_count(len(row), 'cell')}, the header has {len(header)}")
            else:
                yield Record(where, dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise DataError(f"{name}:{max(reader.line_num, 1)}: not a table that can be read: {error}",
                        hint="Is every quote closed, and doubled within a quoted cell?") from None
    finally:
        csv.field_size_limit(before)


def _header(row: list[str], name: str, delimiter: str) -> list[str]:
    header = [cell.strip() for cell in row]
    if "" in header or len(set(header)) < len(header):
        raise DataError(f"{name}:1: the header row needs a different name for every column", got=header)
    others = [mark for mark in ",;\t|" if mark != delimiter and mark in header[0]]
    if len(header) == 1 and others:
        raise DataError(f"{name}:1: one column only, named {header[0]!r}",
                        hint=f"It looks separated by {others[0]!r}: a .csv needs commas, a .tsv tabs.")
    return header


def _parquet(path: Path, name: str, problems: Problems) -> Iterator[Record]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{name}: reading parquet needs pyarrow", hint="Install it: pip install pyarrow") from None
    with path.open("rb") as file:
        if file.read(4) != b"PAR1":
            raise DataError(f"{name}: not a parquet file", hint="Is the extension right?")
    try:
        with parquet.ParquetFile(path) as file:
            classes = _class_names(file.schema_arrow)
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(f"{name} row {number}", _named(fields, classes))
    except (arrow.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        raise DataError(f"{name}: a damaged parquet file, or of a kind that cannot be read: {str(error)[:200]}",
                        hint="Write it again.") from None


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Names of integer classes that Hugging Face's datasets keeps in a parquet file's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        kinds = {column: feature.get("feature", feature) for column, feature in features.items()}
        return {column: [str(name) for name in kind["names"]] for column, kind in kinds.items()
                if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}  # no such metadata, or another tool's: the numbers themselves are the labels


def _named(fields: dict[str, Any], classes: dict[str, list[str]]) -> dict[str, Any]:
    def name(value: Any, names: list[str]) -> Any:
        if isinstance(value, list):
            return [name(item, names) for item in value]
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else value

    return {column: name(value, classes[column]) if column in classes else value for column, value in fields.items()}


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


READERS: dict[str, Callable[[Path, str, Problems], Iterator[Record]]] = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _comma, ".tsv": _tab, ".parquet": _parquet}
