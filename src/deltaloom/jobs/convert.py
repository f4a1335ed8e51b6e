"""A delta in another format: PEFT's, a plain low-rank one, or the native one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltaloom.checkpoint import native
from deltaloom.checkpoint.convert import Converted, check_truncation, put_back, to_lora
from deltaloom.checkpoint.peft import write_peft
from deltaloom.errors import RefusedError, SettingsError, did_you_mean
from deltaloom.files import check_new
from deltaloom.jobs.opening import Opened, needs_delta, open_source
from deltaloom.report.text import figure

FORMATS = ("peft", "lora", "native")


def convert(source: str, to: str, output: Path, *, rank: int | None = None, error: float | None = None,
            model: str | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Write the delta in another format; `rank` or `error` truncates, and the relative error of the changes is given back.

    Raises:
        SettingsError: unknown format, or an error that is no share.
        RefusedError: the format cannot hold the delta, or the folder is not empty.
    """
    if to not in FORMATS:
        raise SettingsError("unknown format", got=to, legal=FORMATS, hint=did_you_mean(to, FORMATS))
    check_truncation(rank, error)
    check_new(output)
    needs_delta(source)
    opened = open_source(source, model=model, dtype="fp32")
    tuned = opened.tuned
    if tuned is None:
        raise RefusedError("there is no delta to convert", got=source)
    missing = 0.0
    if to == FORMATS[1] or rank is not None or error is not None:
        converted = to_lora(tuned, rank=rank, error=error)
        missing = converted.relative_error
        tuned = put_back(tuned.detach(), converted)
    if to == "peft":
        write_peft(tuned, output, source=opened.loaded.source)
    else:
        native.save(tuned, output, base=base_facts(opened))
    say(f"Wrote {output}; relative error {figure(missing)}")
    return {"relative_error": missing, "path": str(output)}


def base_facts(opened: Opened) -> dict[str, Any]:
    """Which base a converted delta belongs to."""
    record = opened.record
    if record is not None:
        return record.base.model_dump()
    return {"source": opened.loaded.source, "commit": opened.loaded.commit, "fingerprint": opened.loaded.fingerprint,
            "task": opened.task.name}


def write_converted(opened: Opened, converted: Converted, output: Path) -> int:
    """A converted delta in the native format."""
    return native.write(converted.saved, output, base=native.BaseRecord.model_validate(base_facts(opened)))
