"""A weighted sum of saved deltas as one low-rank delta."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deltaloom.checkpoint.convert import combine_folders
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.files import check_new
from deltaloom.jobs.convert import write_converted
from deltaloom.jobs.opening import needs_delta, open_source
from deltaloom.report.text import figure


def combine(sources: Sequence[str], output: Path, *, weights: str | None = None, rank: int | None = None,
            model: str | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Write the sum; exact by concatenating ranks, or truncated to `rank` with the relative error.

    Raises:
        SettingsError: weights that are no numbers, or not one for each delta. RefusedError: a delta is no low-rank change.
    """
    if len(sources) < 2:
        raise SettingsError("combining takes two or more deltas", got=len(sources))
    numbers = parsed_weights(weights, len(sources))
    check_new(output)
    folders = [needs_delta(source) for source in sources]
    opened = open_source(str(folders[0]), model=model, dtype="fp32")
    if opened.tuned is None:
        raise RefusedError("there is no delta to combine", got=sources[0])
    converted = combine_folders(opened.tuned.detach(), folders, numbers, rank)
    write_converted(opened, converted, output)
    say(f"Wrote {output}; relative error {figure(converted.relative_error)}")
    return {"relative_error": converted.relative_error, "weights": numbers, "path": str(output)}


def parsed_weights(text: str | None, count: int) -> list[float]:
    """The numbers of "0.5,0.5"; equal shares without a text.

    Raises:
        SettingsError: not numbers, or not as many as there are deltas.
    """
    if text is None:
        return [1.0 / count] * count
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise SettingsError("weights must be numbers, separated by commas", got=text,
                            hint="For example: --weights 0.5,0.5") from None
    if len(numbers) != count:
        raise SettingsError("each delta needs one weight", got=f"{len(numbers)} weights", legal=f"{count} weights")
    return numbers
