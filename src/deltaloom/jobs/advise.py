"""Advice for a run file: facts of its data, model and machine gathered, rules asked, and the run that they propose planned.

The plan is that of the advised run, so that what is proposed is known to be possible before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from deltaloom import attention
from deltaloom.compact import codec_from
from deltaloom.compact.face import compact_layers, parameter_count
from deltaloom.data.rows import TokensRow
from deltaloom.deltas.base import methods_from
from deltaloom.deltas.measured import choice_for
from deltaloom.errors import RefusedError, ResourceError
from deltaloom.evaluate.base import task_named
from deltaloom.files import write_atomic
from deltaloom.jobs.advice import Advice, Draft, Facts, Place, advised
from deltaloom.jobs.budget import BudgetSettings, keeps_its_size, memory_left
from deltaloom.jobs.estimate import block_linears
from deltaloom.jobs.plan import planned
from deltaloom.jobs.prepare import DTYPES, Prepared, Say, chosen_precision, located, model_source, parse_parts
from deltaloom.jobs.runfile import Run, parse_run
from deltaloom.jobs.trial import Bench
from deltaloom.jobs.tune import attached, seen_from
from deltaloom.models import auto_precision, meta_model
from deltaloom.report.text import byte_size, one_line, table_text
from deltaloom.sites import all_sites
from deltaloom.tuned.merging import refuse_unfoldable

FOR_WEIGHTS = 0.8   # of the memory that there is; training wants the rest
# Forms of the weights, the better one first, and what each costs (docs/results/compression.md).
SMALLER = {"int8": "its loss on held-out text was 2.4226 against 2.4195, and a step takes 1.1 times as long",
           "nf4": "its loss on held-out text was 2.75 against 2.42, after a short tuning 1.9% above that on bf16, and a step "
                  "takes 1.1 times as long"}
COMPRESSED, COMPUTED = "docs/results/compression.md", "counted from the model's shapes"
RECOMPUTED = "Chen et al. 2016 (arXiv 1604.06174); not measured by us"
UNCUT = 1_000_000  # tokens of a row: lengths are looked at before anything is cut
SHOWN = 110  # characters of a proposed value in the table


def advise(run: Run, *, merge: bool = False, output: Path | None = None, say: Say = print) -> dict[str, Any]:
    """What `plan` gives, of the advised run, with `advice`: a list of proposals, in the order in which they were made.

    `run` may leave out `deltas` and whatever has a default. `merge`: the delta is to become part of a plain model. `output`:
    where the advised run file is written.

    Raises:
        SettingsError: no method fits the budget. ResourceError: no form of the model fits into memory. RefusedError: `output`
        exists. DeltaloomError: whatever would stop the run before its first step; nothing is written then.
    """
    if output is not None and output.exists():
        raise RefusedError("the file exists", got=str(output), hint="Choose another name for the advised run file.")
    draft = Draft(run.file.given())
    parse_parts(_looked_at(run, draft, run.file.data))
    found = _stored(run, draft)
    bench = Bench(say=say)
    prepared = bench.ready(_looked_at(run, draft, {**run.file.data, "max_length": UNCUT}))
    found += advised(_facts(run, prepared, draft, merge=merge), draft)
    lines: list[str] = []
    plan = planned(bench.ready(_run_of(run, draft)), say=lines.append)
    if not plan["fits"] and not draft.train.gradient_checkpointing:
        found.append(_recomputed(draft, plan))
        lines.clear()
        plan = planned(bench.ready(_run_of(run, draft)), say=lines.append)
    for line in lines:
        say(line)
    _tell(found, say)
    if output is not None:
        write_atomic(output, _text(run, draft, found, output))
        say(f"Wrote {output}. Look at it, then: deltaloom tune {output}")
    return plan | {"advice": [each.as_dict() for each in found], "path": None if output is None else str(output)}


def _run_of(run: Run, draft: Draft) -> Run:
    """The run that a draft stands for."""
    return parse_run(draft.values, base=run.base, name=run.name)


def _looked_at(run: Run, draft: Draft, data: dict[str, Any]) -> Run:
    """The same with another section `data`, and with some method where none is stated yet."""
    deltas = draft.get("deltas") or [dict(choice_for(None, generates=True).delta)]
    return parse_run({**draft.values, "data": data, "deltas": deltas}, base=run.base, name=run.name)


def _facts(run: Run, prepared: Prepared, draft: Draft, *, merge: bool) -> Facts:
    model, task, examples = prepared.loaded.model, prepared.task, prepared.examples
    sites = all_sites(model)
    linears = block_linears(sites)
    places = [Place(site.name, site.role, site.layer, site.d_in + site.d_out) for site in sites
              if site.kind == "linear" and site.layer is not None and (site.role in ("q", "v") or site in linears)]
    lengths = [example.length + example.cut for example in examples]
    limit = prepared.parts.budget.numbers(prepared.model_parameters)
    numbers, reason = _stated(prepared, asked=limit is not None or merge) if draft.get("deltas") else (None, "")
    return Facts(
        rows=len(examples), lengths=lengths, unit=sum(site.d_in + site.d_out for site in linears), places=places,
        longest=task.most_tokens if prepared.loaded.tokenizer is not None else max(lengths, default=1),
        eval_rows=prepared.facts["eval_rows"], labels=prepared.facts["labels"], duplicates=prepared.facts["duplicates"],
        overlap=prepared.facts["overlap"], generates=task.generates, packable=_packable(prepared),
        classes=task.primary == "accuracy" and not isinstance(prepared.rows.train.rows[0], TokensRow),
        on_cpu=not torch.cuda.is_available(), limit=limit, stated_numbers=numbers, merge=merge, unmergeable=reason)


def _stated(prepared: Prepared, *, asked: bool) -> tuple[int | None, str]:
    """(trained numbers of the stated deltas, None where they change in training; why they cannot be merged), if asked for."""
    if not asked:
        return None, ""
    tuned = attached(prepared)
    try:
        numbers = tuned.counts()[0] if keeps_its_size(tuned) else None
        refuse_unfoldable(tuned.pairs())
    except RefusedError as error:
        return numbers, error.problems[0] if error.problems else str(error)
    finally:
        tuned.detach()
    return numbers, ""


def _packable(prepared: Prepared) -> bool:
    try:
        attention.check_packable(prepared.loaded.model)
        prepared.task.pack(prepared.examples[:1])
    except RefusedError:
        return False
    return True


def _stored(run: Run, draft: Draft) -> list[Advice]:
    """How the model is kept, where its weights would take nearly all memory; nothing is loaded.

    Raises:
        ResourceError: no form is small enough.
    """
    limit = memory_left(BudgetSettings.parse(run.file.budget, "budget"), torch.device("cpu"))
    if limit is None or run.file.task is None:
        return []
    model = meta_model(model_source(run), task=task_named(run.file.task).name)
    if compact_layers(model) or draft.get("base.quantise"):
        return []
    linears, total = block_linears(all_sites(model)), parameter_count(model)
    dtype = chosen_precision(draft.train.precision)[1]
    room = FOR_WEIGHTS * limit
    there = f"{byte_size(limit)} of memory can be used"
    if total * dtype.itemsize <= room:
        return []
    found = []
    if draft.get("train.precision") == "fp32" and auto_precision().name == "bf16":
        dtype = DTYPES["bf16"]
        found.append(draft.propose("train.precision", "bf16", f"the weights take {byte_size(4 * total)} in fp32 and "
                                   f"{byte_size(2 * total)} in bf16; {there}", COMPUTED))
    if total * dtype.itemsize > room:
        found.append(_form(draft, [(site.d_out, site.d_in) for site in linears], total, dtype, room, there))
    for advice in found:
        draft.take(advice)
    return found


def _form(draft: Draft, shapes: Sequence[tuple[int, int]], total: int, dtype: torch.dtype, room: float, there: str) -> Advice:
    rest = (total - sum(d_out * d_in for d_out, d_in in shapes)) * dtype.itemsize
    sizes = {name: rest + sum(codec_from(name).encoded_bytes(*shape) for shape in shapes) for name in SMALLER}
    name = next((name for name, size in sizes.items() if size <= room), None)
    if name is None:
        raise ResourceError("no form of this model that we have leaves room for training", got=there,
                            legal=[f"{key}: {byte_size(size)}" for key, size in sizes.items()],
                            hint="Take a smaller model, or a machine with more memory.")
    return draft.propose("base.quantise", name, f"the weights take {byte_size(total * dtype.itemsize)}, and "
                         f"{byte_size(sizes[name])} with {name}; {there}; {SMALLER[name]}", COMPRESSED)


def _recomputed(draft: Draft, plan: dict[str, Any]) -> Advice:
    """Activations computed again, where training does not fit into memory."""
    advice = draft.propose("train.gradient_checkpointing", True, f"training takes at least {byte_size(plan['memory_bytes'])} "
                           "beside the model, which is too much here; with activations computed again in the backward pass it "
                           "takes less, for one more forward pass", RECOMPUTED)
    draft.take(advice)
    return advice


def _tell(found: Sequence[Advice], say: Say) -> None:
    if not found:
        say("Advice: nothing. What the run file states and leaves out is as we would have it.")
        return
    say(table_text(("setting", "proposed", "stated", "reason", "evidence"),
                   [(each.setting, _shown(each.value, "look at it"), _shown(each.present, "-"), each.reason, each.evidence)
                    for each in found], "Advice", width=180))
    say("The plan above is that of the run with all of it.")


def _shown(value: Any, nothing: str) -> str:
    if value is None:
        return nothing
    return one_line(yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).removesuffix("...\n"), SHOWN)


def _text(run: Run, draft: Draft, found: Sequence[Advice], path: Path) -> str:
    """The advised run file, with the reasons as comments; relative paths start at its own folder."""
    values, folder = dict(draft.values), path.resolve().parent
    if folder != run.base.resolve():
        values["data"] = values["data"] | {key: seen_from(folder, values["data"][key], run.base)
                                           for key in ("train", "eval") if values["data"].get(key) is not None}
        if model_source(run) != run.file.model:
            values["model"] = seen_from(folder, run.file.model, run.base)
        values["deltas"] = _settled(run, draft)
    comments = [f"# {each.setting}: {one_line(each.reason, 1000)} [{each.evidence}]" for each in found]
    return "\n".join(["# Proposed by deltaloom plan --advise, with the reasons:", *comments,
                      yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)])


def _settled(run: Run, draft: Draft) -> list[dict[str, Any]]:
    """The entries of `deltas` with the files that they name as whole paths."""
    entries = draft.values["deltas"]
    if any("from" in entry for entry in entries):
        return [{"from": str(located(str(entry["from"]), run.base).resolve())} for entry in entries]
    return [{"method": method.name, **method.settled(run.base).given()} for method in methods_from(entries)]
