"""Images: a folder of classes, checks of image files, and opening one as RGB."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from deltaloom.data.records import Problems
from deltaloom.data.rows import ImageRow, Row
from deltaloom.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF"}


def read_folder(folder: Path, name: str, limit: int | None = None) -> list[Row]:
    """Rows of a folder that has one folder of images for each class, in order of class and file name.

    Raises:
        DataError: no class folders, a class without images, or files that are none.
    """
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise DataError(f"{name} has no folders in it",
                        hint="Images are read from one folder for each class: cats/1.png, dogs/1.png.")
    problems = Problems()
    rows: list[Row] = []
    for each in classes:
        files = sorted(entry for entry in each.iterdir() if entry.is_file() and not entry.name.startswith("."))
        if not files:
            problems.add(f"{name}/{each.name}", "no images")
        for file in files:
            where = f"{name}/{each.name}/{file.name}"
            if file.suffix.lower() not in SUFFIXES:
                problems.add(where, f"not an image (known: {', '.join(SUFFIXES)})")
            rows.append(ImageRow(where, file, each.name))
    problems.check("images cannot be read", "Remove what does not belong there.")
    return rows[:limit]


def check_images(rows: list[Row], problems: Problems) -> None:
    """Note every image that does not open; headers and checksums only, no pixels."""
    for row in rows:
        if isinstance(row, ImageRow) and (bad := _fault(row.image)):
            problems.add(row.where, bad)


def open_image(image: Path | bytes) -> Image:
    """The image in RGB."""
    with _opened(image) as opened:
        return opened.convert("RGB")


def _opened(image: Path | bytes) -> Image:
    from PIL import Image as pillow

    return pillow.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=sorted(set(SUFFIXES.values())))


def _fault(image: Path | bytes) -> str | None:
    from PIL import Image as pillow
    from PIL import UnidentifiedImageError

    if isinstance(image, Path) and not image.is_file():
        return f"no such image file: {image.name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a picture of more than 89 million pixels is a warning of Pillow
            with _opened(image) as opened:
                opened.verify()
    except UnidentifiedImageError:
        return "not an image, or of an unknown kind"
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning):
        return "too many pixels"
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, Warning) as error:  # what Pillow's readers raise on damage
        return f"a damaged image: {str(error)[:100]}"
    return None
