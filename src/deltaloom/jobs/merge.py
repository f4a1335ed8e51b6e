"""A plain model with the delta folded into its weights, and how far it is from the model with the delta beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltaloom.checkpoint.merged import save_merged
from deltaloom.errors import RefusedError
from deltaloom.files import check_new
from deltaloom.jobs.opening import AS_STORED, Opened, dtype_named, needs_delta, open_source
from deltaloom.jobs.probe import probe
from deltaloom.models.compact import form_of, settle_forms
from deltaloom.report.text import byte_size, figure
from deltaloom.tuned.merging import logits_error
from deltaloom.tuned.merging import merge as fold


def merge(source: str, output: Path, *, dtype: str | None = None, model: str | None = None, requantise: bool = False,
          say: Callable[[str], None] = print) -> dict[str, Any]:
    """Write the merged model; gives back the rounding error of the weights and the error of the logits on random inputs.

    Of a quantised base the model written is dense; with `requantise` its layers are stored as they were, and the error is that
    of quantising the changed weights again.

    Raises:
        RefusedError: a delta cannot be folded, with the reason; the output folder is not empty; nothing is there to requantise.
    """
    stored = dtype_named(dtype)
    check_new(output)
    needs_delta(source)
    opened = open_source(source, model=model, dtype=dtype if dtype in ("fp32", "bf16") else AS_STORED)
    tuned = opened.tuned
    if tuned is None:
        raise RefusedError("there is no delta to merge", got=source)
    _check_requantise(opened, requantise, dtype)
    facts = fold(tuned, requantise=requantise)
    error = logits_error(tuned, probe(opened.loaded))
    for note in facts.notes:
        say(f"note: {note}")
    with tuned.bare() as plain:
        settle_forms(plain, keep=requantise)
        size = save_merged(plain, opened.loaded.tokenizer or opened.loaded.processor, output, stored)
    say(f"Merged model: {output} ({byte_size(size)})")
    say(f"Largest error of a weight {figure(facts.max_error)}, relative {figure(facts.relative_error)}; "
        f"of a logit {figure(error)}")
    return {"max_error": facts.max_error, "relative_error": facts.relative_error, "logits_max_error": error,
            "path": str(output), "bytes": size, "notes": list(facts.notes)}


def _check_requantise(opened: Opened, requantise: bool, dtype: str | None) -> None:
    if requantise and form_of(opened.loaded.model) is None:
        raise RefusedError("the base is dense, so that there is nothing to requantise", got=opened.loaded.source,
                           hint="Leave --requantise out, or quantise the merged model.")
    if requantise and dtype is not None:
        raise RefusedError("a model that is quantised again keeps the types that it has", got=f"--dtype {dtype}")
