"""What a run would do, without training: sites, parameters, memory and time, the first rows as the model will see them."""

from __future__ import annotations

from typing import Any

from deltaloom.checkpoint.record import read_record
from deltaloom.errors import ResourceError
from deltaloom.events import finite
from deltaloom.jobs.budget import check_numbers, memory_left
from deltaloom.jobs.engine import feed_of, trial_of
from deltaloom.jobs.estimate import flops_per_token, rough_seconds
from deltaloom.jobs.opening import needs_delta
from deltaloom.jobs.prepare import DTYPES, Prepared, Say, parse_parts, prepare
from deltaloom.jobs.runfile import Run
from deltaloom.jobs.tune import attached, site_table, untouched_sites
from deltaloom.report.text import byte_size, count, duration, table_text
from deltaloom.train.forecast import Forecast, check_memory, forecast
from deltaloom.train.memory import free_bytes, give_back_freed_memory
from deltaloom.train.progress import planned_steps
from deltaloom.tuned import Tuned

BYTES = 4  # of a trained number on the disk


def plan(run: Run, *, say: Say = print) -> dict[str, Any]:
    """The plan of a run; nothing is written.

    Raises:
        DeltaloomError: whatever would stop the run before its first step.
    """
    parts = parse_parts(run)
    give_back_freed_memory()  # as training does, so that the peak is the same
    record = read_record(needs_delta(parts.continued)) if parts.continued else None
    return planned(prepare(run, parts, say=say, record=record), say=say)


def planned(prepared: Prepared, *, say: Say) -> dict[str, Any]:
    """The plan of a run whose rows and model are ready; its deltas are off the model again at the end.

    Raises:
        DeltaloomError: as `plan`.
    """
    tuned = attached(prepared)
    try:
        return _plan_of(prepared, tuned, say)
    finally:
        tuned.detach()


def _plan_of(prepared: Prepared, tuned: Tuned, say: Say) -> dict[str, Any]:
    check_numbers(prepared.parts.budget, tuned, prepared.model_parameters)
    tokens = _tokens(prepared)
    deltas, heads = tuned.counts()
    share = prepared.facts["learned_tokens"] / max(prepared.facts["tokens"], 1) if prepared.task.generates else 0.0
    flops = flops_per_token(untouched_sites(tuned), deltas + heads, share)
    table = site_table(tuned)
    found, too_large = _tried(prepared, tuned, rough=rough_seconds(flops, tokens, DTYPES[prepared.precision]))
    warnings = [*prepared.notes, *([("memory", too_large)] if too_large else [])]
    for kind, message in warnings:
        say(f"warning ({kind}): {message}")
    _tell(prepared, tuned, table, prepared.model_parameters, say)
    delta_bytes = BYTES * (deltas + heads)
    say(f"Model: {byte_size(prepared.model_bytes)}")
    say(f"Delta: {byte_size(delta_bytes)}; training: about {byte_size(found.peak_bytes)} besides the model, "
        f"about {duration(found.seconds)} for {count(tokens)} tokens"
        + (" (rough: nothing was tried)" if too_large else " (from a few of its steps)"))
    return finite({"sites": table, "trainable_parameters": deltas, "head_parameters": heads,
                   "total_parameters": prepared.model_parameters, "delta_bytes": delta_bytes, "model_bytes": prepared.model_bytes,
                   "flops_per_token": flops, "memory_bytes": found.peak_bytes, "free_bytes": free_bytes(tuned.device),
                   "fits": not too_large, "seconds": found.seconds, "tokens": tokens, "data": prepared.facts,
                   "warnings": [message for _, message in warnings]})


def _tried(prepared: Prepared, tuned: Tuned, *, rough: float) -> tuple[Forecast, str | None]:
    """What a few steps say; for a run that does not fit into memory, what it needs at least and why it does not."""
    trial = trial_of(prepared, tuned)
    try:
        check_memory(trial, memory_left(prepared.parts.budget, tuned.device, prepared.model_bytes))
    except ResourceError as error:
        return Forecast(rough, trial.need), str(error)
    settings, feed = prepared.parts.train, feed_of(prepared)
    steps = planned_steps(settings, feed)
    if steps is not None:
        return forecast(trial, steps), None
    found = forecast(trial, len(feed.steps(0)))
    return Forecast(settings.time_limit or found.seconds, found.peak_bytes), None


def _tokens(prepared: Prepared) -> int:
    """Real tokens of the whole run."""
    settings, rows = prepared.parts.train, len(prepared.examples)
    if settings.max_steps is not None:
        per_step = settings.batch_tokens or (settings.rows_per_step or 16) * prepared.facts["tokens"] / rows
        return int(settings.max_steps * per_step)
    return int((settings.epoch_limit or 1.0) * prepared.facts["tokens"])


def _tell(prepared: Prepared, tuned: Tuned, table: list[dict[str, Any]], model_parameters: int, say: Say) -> None:
    deltas, heads = tuned.counts()
    say(table_text(("method", "where", "sites", "parameters", "for example"),
                   [(row["method"], row["target"], row["sites"], count(row["parameters"]), row["examples"][0]) for row in table]))
    say(f"{count(deltas)} trained parameters, {deltas / model_parameters:.2%} of {count(model_parameters)}"
        + (f"; and a head of {count(heads)}" if heads else ""))
    facts = prepared.facts
    say(f"Lengths in tokens: {facts['lengths']}; cut rows: {facts['truncated_rows']}")
    say("First rows as the model sees them; what it learns to write stands between >> and <<:")
    for row in facts["first_rows"]:
        parts = [f">>{part['text']}<<" if part.get("learned") else part["text"] for part in row.get("segments", [])]
        say(f"  {row.get('where', '')}: {''.join(parts)!r}" + (f" -> {row['target']}" if row.get("target") and not any(
            part.get("learned") for part in row.get("segments", [])) else ""))
