"""Several saved deltas as one low-rank delta."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deltaloom.checkpoint.convert import check_truncation, combine_folders
from deltaloom.checkpoint.merges import LINEAR, rule_of
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.files import check_new
from deltaloom.jobs.convert import write_converted
from deltaloom.jobs.opening import needs_delta, open_source
from deltaloom.jobs.several import parsed_weights
from deltaloom.report.text import figure


def combine(sources: Sequence[str], output: Path, *, weights: str | None = None, rank: int | None = None,
            error: float | None = None, how: str = LINEAR, density: float | None = None, seed: int = 0,
            model: str | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Write the sum, exact by concatenating ranks, or what another way makes of the changes; `rank` or `error` truncates.

    Raises:
        SettingsError: weights that are no numbers, or not one for each delta; settings that `how` has no meaning for.
        RefusedError: a delta is no low-rank change.
    """
    if len(sources) < 2:
        raise SettingsError("combining takes two or more deltas", got=len(sources))
    numbers = parsed_weights(weights, len(sources))
    check_truncation(rank, error)
    rule = rule_of(how, numbers, density=density, seed=seed, truncated=rank is not None or error is not None)
    check_new(output)
    folders = [needs_delta(source) for source in sources]
    opened = open_source(str(folders[0]), model=model, dtype="fp32")
    if opened.tuned is None:
        raise RefusedError("there is no delta to combine", got=sources[0])
    converted = combine_folders(opened.tuned.detach(), folders, numbers, rank, error=error, rule=rule)
    write_converted(opened, converted, output)
    say(f"Wrote {output}; relative error {figure(converted.relative_error)}")
    return {"relative_error": converted.relative_error, "weights": numbers, "path": str(output), "how": how,
            "sites": {path: {"rank": own, "relative_error": missing} for path, (own, missing) in converted.sites.items()}}
