"""Reading: from settings to rows, checked as a whole before anything else starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deltaloom.data.formats import FORMATS, Reading, choose, convert, template_fields, visible
from deltaloom.data.images import check_images, read_folder
from deltaloom.data.labels import split
from deltaloom.data.records import Problems, Record, read_records
from deltaloom.data.rows import Row
from deltaloom.data.settings import DataSettings, files_of, resolved
from deltaloom.errors import DataError, SettingsError, did_you_mean, listed


@dataclass(frozen=True)
class Rows:
    """Rows of one or several files, and what was detected; `unused` are columns that nothing reads."""

    rows: tuple[Row, ...]
    format: str
    detected: str
    unused: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Data:
    """Training and evaluation rows; `eval` is None where the settings name none."""

    train: Rows
    eval: Rows | None


def read_data(settings: DataSettings, base: Path, *, accepts: Sequence[str], numbers: bool = False, seed: int = 0) -> Data:
    """The rows that the settings name; relative paths start at `base`, the run file's folder.

    `accepts` are the formats of the task, `numbers` says that labels are numbers, `seed` decides the split of `eval_fraction`.

    Raises:
        DataError: files or rows that cannot be used.
        SettingsError: no training file is named, or the template cannot be read.
    """
    if settings.train is None:
        raise SettingsError("data.train is missing", hint="Name the training file, for example: data: {train: train.jsonl}")
    train = read_rows(files_of(settings.train), settings, base, accepts=accepts, numbers=numbers)
    if settings.eval is not None:
        return Data(train, read_rows(files_of(settings.eval), settings, base, accepts=accepts, numbers=numbers))
    if settings.eval_fraction is None:
        return Data(train, None)
    kept, held = split(train.rows, settings.eval_fraction, seed)
    return Data(replace(train, rows=kept), replace(train, rows=held))


def read_rows(files: Sequence[str], settings: DataSettings, base: Path, *, accepts: Sequence[str], numbers: bool = False,
              need_targets: bool = True) -> Rows:
    """The rows of files, one after another; with `need_targets=False` labels and completions may be absent (for predictions).

    Raises:
        DataError: all bad rows at once with file and line, or what is wrong with a file.
    """
    if not set(accepts) <= set(FORMATS):
        raise SettingsError("unknown formats", got=list(accepts), legal=FORMATS)
    paths = [resolved(name, base) for name in files]
    if settings.format in ("auto", "image") and "image" in accepts and all(path.is_dir() for path in paths):
        return _read_folders(files, paths, settings.max_rows)
    problems = Problems()
    parts: list[tuple[Path, list[Record]]] = []
    for name, path in zip(files, paths, strict=True):
        left = None if settings.max_rows is None else settings.max_rows - sum(len(part) for _, part in parts)
        if left is None or left > 0:
            parts.append((path.parent, read_records(path, problems, name, left)))
    found = {column for _, part in parts for record in part for column in record.fields}
    if not found:
        problems.check(f"{listed(files)} cannot be used")
    _check_columns(settings, found)
    reading = Reading(numbers=numbers, need_targets=need_targets, template=settings.template)
    chosen = choose(settings.format, visible(found, settings.columns), reading, accepts)
    rows = [row for folder, part in parts
            for row in convert(part, chosen, settings.columns, replace(reading, folder=folder), problems)]
    check_images(rows, problems)
    problems.check(f"{listed(files)} cannot be used as {chosen.name}", "Correct these rows or leave them out.")
    used = {*chosen.needs, *chosen.targets, *chosen.may, *(template_fields(settings.template) if settings.template else ())}
    unused = tuple(sorted(visible(found, settings.columns) - used))
    return Rows(tuple(rows), chosen.name, _detected(settings, chosen.name, sorted(found)), unused)


def _read_folders(files: Sequence[str], paths: list[Path], limit: int | None) -> Rows:
    rows = [row for name, path in zip(files, paths, strict=True) for row in read_folder(path, name)][:limit]
    problems = Problems()
    check_images(rows, problems)
    problems.check("images cannot be read", "Remove or replace them.")
    return Rows(tuple(rows), "image", "image (a folder for each class)")


def _check_columns(settings: DataSettings, found: set[str]) -> None:
    """That `columns` and `template` name columns which exist."""
    wrong = [f"columns.{name} names '{column}'" for name, column in settings.columns.items() if column not in found]
    if wrong:
        column = next(column for column in settings.columns.values() if column not in found)
        raise DataError(f"{listed(wrong)}, which is no column; the file has {listed(map(repr, sorted(found)))}",
                        hint=did_you_mean(column, found))
    if settings.template is not None:
        legal = found | set(settings.columns)
        unknown = [name for name in template_fields(settings.template) if name not in legal]
        if unknown:
            raise SettingsError(f"data.template names {listed(map(repr, unknown))}, which is no column", legal=sorted(legal),
                                hint=did_you_mean(unknown[0], legal))


def _detected(settings: DataSettings, name: str, columns: list[str]) -> str:
    how = "as the settings say" if settings.format != "auto" else f"by the columns {listed(columns)}"
    return f"{name} ({how})"
