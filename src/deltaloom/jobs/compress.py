"""A smaller model: the steps of a compression one after another, measured before and after, in a folder of its own."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deltaloom.checkpoint.merged import write_model
from deltaloom.compact.face import parameter_count
from deltaloom.compress.base import Compressor, Work, check_kept, compressor_record, weight_bytes
from deltaloom.data.batches import Batch, micro_batches
from deltaloom.data.encode import Example
from deltaloom.data.labels import LabelMap
from deltaloom.data.read import Rows, read_data, read_rows
from deltaloom.data.settings import files_of
from deltaloom.errors import RefusedError, SettingsError, listed
from deltaloom.evaluate.base import Targets, Task, task_named, task_names
from deltaloom.events import finite
from deltaloom.files import atomic_folder, check_new, write_atomic
from deltaloom.jobs.compressfile import CompressRun
from deltaloom.jobs.doctor import environment
from deltaloom.jobs.folder import check_folder, write_json
from deltaloom.jobs.prepare import chosen_precision
from deltaloom.jobs.probe import probe, side_by_side
from deltaloom.jobs.scoring import score
from deltaloom.models import LoadedModel, load_model, meta_model, own_task
from deltaloom.models.compact import record_forms
from deltaloom.models.identity import tokenizer_hash
from deltaloom.models.load import NEW_HEAD
from deltaloom.report.card import base_model
from deltaloom.report.compression import compression_card, compression_page, compression_text, plan_text

RECORD, FORMAT = "compression.json", 1
MICRO_TOKENS = 2048  # tokens of a calibration batch with padding
CLOSE = 1e-4         # how far the logits of the folder's model may be from those in memory, relative to 1 + |logit|
Say = Callable[[str], None]


@dataclass
class Prepared:
    """Everything that is known before the model is loaded."""

    run: CompressRun
    source: str
    kind: type[Task]
    bare: bool                 # the checkpoint is a backbone without a head: it is saved without one too
    rows: Rows | None
    held: Rows | None
    labels: LabelMap | None
    dtype: torch.dtype | None  # None: as stored
    sizes: list[dict[str, int]] = field(default_factory=list)  # parameters and bytes: before, and after each step


@dataclass
class Opened:
    """The loaded model and its rows."""

    loaded: LoadedModel
    task: Task
    examples: list[Example]
    held: list[Example]
    notes: list[str]


def compress(run: CompressRun, *, plan: bool = False, say: Say = print) -> dict[str, Any]:
    """Make the smaller model, or with `plan` only say what it will weigh; gives back what compression.json holds.

    Raises:
        DeltaloomError: of the kind that says what happened. Settings, rows, output and shapes are checked before the model is
        loaded; the folder is complete or absent.
    """
    output = _output(run) if not plan else None
    prepared = prepare(run, say)
    if output is None:
        found = _planned(prepared)
        say(plan_text(found))
        return finite(found)
    opened = _open(prepared, say)
    model = opened.loaded.model
    held_rows = prepared.held.rows if prepared.held is not None else ()
    before = score(opened.task, model, opened.held, held_rows)
    before_sizes, before_intervals = sizes(_kept(model, prepared)), opened.task.intervals(before.predictions, held_rows)
    work = _work(prepared, opened, say)
    steps = _run_steps(run.steps, work, prepared)
    after = score(opened.task, work.model, opened.held, held_rows)
    opened.notes += _surprises(prepared, steps, before_sizes)
    found = {
        "format": FORMAT, "model": _name(opened.loaded.source), "commit": opened.loaded.commit,
        "fingerprint": opened.loaded.fingerprint,
        "tokenizer_sha256": tokenizer_hash(opened.loaded.tokenizer) if opened.loaded.tokenizer is not None else None,
        "task": opened.task.name, "seed": run.file.seed,
        "precision": str(model.dtype).removeprefix("torch."), "steps": steps,
        "bytes_before": before_sizes["bytes"], "bytes_after": steps[-1]["bytes"],
        "parameters_before": before_sizes["parameters"], "parameters_after": steps[-1]["parameters"],
        "predicted_bytes": prepared.sizes[-1]["bytes"],
        "primary": {"name": opened.task.primary, "higher_is_better": opened.task.higher_is_better},
        "base_metrics": before.metrics, "metrics": after.metrics, "base_intervals": before_intervals,
        "intervals": opened.task.intervals(after.predictions, held_rows),
        "rows": {"calibration": sum(map(len, (batch.examples for batch in work.batches))), "training": len(opened.examples),
                 "held_out": len(held_rows)},
        "time": _times(work.teacher(), work.model, probe(opened.loaded)), "notes": opened.notes, "versions": environment()}
    found = _write(prepared, opened, work.model, output, found)
    say(compression_text(found))
    say(f"Model:  {output}")
    say(f"Report: {output / 'report.html'}")
    return finite(found | {"path": str(output)})


def prepare(run: CompressRun, say: Say) -> Prepared:
    """Everything checked that can be checked without values: rows read, every step sketched on the shapes alone.

    Raises:
        SettingsError, DataError, TargetError, RefusedError: what is wrong.
    """
    file = run.file
    hungry = [step.name for step in run.steps if step.needs_rows()]
    if hungry and run.data.train is None:
        raise SettingsError(f"{listed(hungry)} needs rows to look at, and none are given",
                            hint="Name a file of them with --data FILE, or data: {train: FILE} in a run file.")
    late = [step.name for index, step in enumerate(run.steps) if step.leads and index]
    if late:
        raise SettingsError(f"{late[0]} has to be the first step: what it promises is about the original model",
                            got=[step.name for step in run.steps])
    near = run.base / file.model
    source = str(near) if near.exists() else file.model
    own = own_task(source)
    name = file.task or own
    if name is None:
        raise SettingsError("this model has no head that would say what it is for", got=file.model, legal=task_names(),
                            hint="Name the task with --task.")
    kind, bare = task_named(name), name != own and name in NEW_HEAD
    rows, held = _read(run, kind)
    if bare and held is not None:
        raise RefusedError(f"the model has no trained head for {name}, so that there is nothing to measure on held-out rows",
                           got=file.model, hint="Leave the held-out rows away, or name a model that was trained for the task.")
    dtype = None if file.precision == "stored" else chosen_precision(file.precision)[1]
    labels = kind.prepare(run.data, rows.rows).labels if bare and rows is not None else None
    prepared = Prepared(run, source, kind, bare, rows, held, labels, dtype)
    for title, found in (("Calibration rows", rows), ("Held-out rows", held)):
        if found is not None:
            say(f"{title}: {len(found)}; {found.detected}")
    _sketch(prepared)
    return prepared


def sizes(model: torch.nn.Module) -> dict[str, int]:
    """Parameters (a quantised weight counts as the numbers it stands for) and bytes of a model."""
    return {"parameters": parameter_count(model), "bytes": weight_bytes(model)}


def _output(run: CompressRun) -> Path:
    if run.file.output is None:
        raise SettingsError("no output folder is given", hint="Name one with -o DIR, or output: DIR in a run file.")
    output = Path(run.file.output).expanduser()
    check_new(output)
    check_folder(output, resume=False, overwrite=False)  # that it can be written
    return output


def _read(run: CompressRun, kind: type[Task]) -> tuple[Rows | None, Rows | None]:
    settings, base = run.data, run.base
    if settings.train is not None:
        data = read_data(settings, base, accepts=kind.formats, numbers=kind.numbers, seed=run.file.seed)
        return data.train, data.eval
    if settings.eval is None:
        return None, None
    return None, read_rows(files_of(settings.eval), settings, base, accepts=kind.formats, numbers=kind.numbers)


def _sketch(prepared: Prepared) -> None:
    labels = list(prepared.labels.names) if prepared.labels else None
    model = meta_model(prepared.source, task=prepared.kind.name, labels=labels)
    quantised = getattr(model.config, "quantization_config", None)
    if quantised is not None:
        raise RefusedError("this model is quantised or compressed already", got=_name(prepared.source),
                           hint="Compress the original, with all the steps in one list of a run file.")
    if prepared.dtype is not None:
        torch.nn.Module.to(model, prepared.dtype)  # transformers' own has no types
    prepared.sizes.append(sizes(_kept(model, prepared)))
    for step in prepared.run.steps:
        step.sketch(model)
        prepared.sizes.append(sizes(_kept(model, prepared)))


def _kept(model: PreTrainedModel, prepared: Prepared) -> torch.nn.Module:
    """What is saved of a model: of a backbone, no head."""
    return model.base_model if prepared.bare else model


def _planned(prepared: Prepared) -> dict[str, Any]:
    first, last = prepared.sizes[0], prepared.sizes[-1]
    steps = [{"step": compressor_record(step), **size}
             for step, size in zip(prepared.run.steps, prepared.sizes[1:], strict=True)]
    return {"model": _name(prepared.source), "task": prepared.kind.name, "steps": steps, "bytes_before": first["bytes"],
            "bytes_after": last["bytes"], "parameters_before": first["parameters"], "parameters_after": last["parameters"],
            "exact": not any(step.estimates for step in prepared.run.steps)}


def _open(prepared: Prepared, say: Say) -> Opened:
    labels = list(prepared.labels.names) if prepared.labels else None
    torch.manual_seed(prepared.run.file.seed)
    loaded = load_model(prepared.source, task=prepared.kind.name, labels=labels, dtype=prepared.dtype)
    if loaded.new_parameters and not prepared.bare:
        raise RefusedError(f"the model lacks tensors, which would be random: {listed(loaded.new_parameters, 4)}",
                           got=prepared.source)
    say(f"Model: {loaded.source}, {type(loaded.model).__name__}, {str(loaded.model.dtype).removeprefix('torch.')}")
    known = prepared.labels if prepared.bare else _labels_of(loaded, prepared.kind)
    task = prepared.kind(prepared.run.data, Targets(known), loaded.model.config, tokenizer=loaded.tokenizer,
                         processor=loaded.processor)
    examples = task.encode(prepared.rows.rows) if prepared.rows is not None else []
    held = task.encode(prepared.held.rows) if prepared.held is not None else []
    notes = [*loaded.notes, *task.notes, *_meeting(prepared)]
    if not held:
        notes.append("no held-out rows were given, so that nothing is known of the quality of the result")
    cut = sum(example.cut > 0 for example in (*examples, *held))
    if cut:
        notes.append(f"{cut} rows were cut to data.max_length {task.max_length}")
    return Opened(loaded, task, examples, held, notes)


def _labels_of(loaded: LoadedModel, kind: type[Task]) -> LabelMap | None:
    names = getattr(loaded.model.config, "id2label", None)
    if kind.numbers or kind.generates or not names:
        return None
    return LabelMap(tuple(str(names[index]) for index in sorted(names)))


def _meeting(prepared: Prepared) -> list[str]:
    """A warning where rows serve both to compress and to measure."""
    if prepared.rows is None or prepared.held is None:
        return []
    seen = {row.source for row in prepared.rows.rows}
    both = sum(row.source in seen for row in prepared.held.rows)
    return [f"{both} held-out rows are calibration rows too: what is measured on them flatters the result"] if both else []


def _work(prepared: Prepared, opened: Opened, say: Say) -> Work:
    """What the steps share; they look at evenly spaced rows, so that a sorted file shows all its kinds."""
    examples, most = opened.examples, prepared.run.file.calibration
    spaced = [examples[index * len(examples) // most] for index in range(most)] if len(examples) > most else examples
    batches: list[Batch] = [opened.task.collate([spaced[index] for index in part])
                            for part in micro_batches(range(len(spaced)), [each.length for each in spaced], MICRO_TOKENS)]

    def original() -> PreTrainedModel:
        torch.manual_seed(prepared.run.file.seed)  # the same random head, where there is one
        labels = list(prepared.labels.names) if prepared.labels else None
        return load_model(prepared.source, task=prepared.kind.name, labels=labels, dtype=prepared.dtype).model

    return Work(opened.loaded.model, opened.task, batches, examples, original=original, say=say,
                generator=torch.Generator().manual_seed(prepared.run.file.seed))


def _run_steps(steps: Sequence[Compressor], work: Work, prepared: Prepared) -> list[dict[str, Any]]:
    done = []
    for index, step in enumerate(steps):
        work.say(f"Step {index + 1} of {len(steps)}: {step.name}")
        began = time.perf_counter()
        facts = step.apply(work)
        work.model.eval()
        work.promised += facts.hashes
        check_kept(work.model, work.promised)
        done.append({"step": compressor_record(step), "seconds": time.perf_counter() - began,
                     **sizes(_kept(work.model, prepared)), "facts": facts.as_dict()})
    return done


def _surprises(prepared: Prepared, steps: Sequence[dict[str, Any]], before: dict[str, int]) -> list[str]:
    """Notes of the steps, and where the result weighs something else than was predicted."""
    notes = [note for step in steps for note in step["facts"]["notes"]]
    if before != prepared.sizes[0]:
        notes.append(f"the model weighs {before['bytes']} bytes, and by its configuration {prepared.sizes[0]['bytes']}")
    elif steps[-1]["bytes"] != prepared.sizes[-1]["bytes"] and not any(step.estimates for step in prepared.run.steps):
        notes.append(f"the result weighs {steps[-1]['bytes']} bytes, and {prepared.sizes[-1]['bytes']} were predicted")
    return notes


def _times(original: PreTrainedModel, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Both models loaded at once and timed in turns: figures taken minutes apart would tell of the machine."""
    before, after = side_by_side([original, model], inputs)
    return {"unit": "generated token" if model.can_generate() else "row", "seconds_before": before, "seconds_after": after,
            "speedup": before / after}


def _write(prepared: Prepared, opened: Opened, model: PreTrainedModel, output: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The folder, under its name only when all of it is there and its model says what the one in memory says."""
    kept = _kept(model, prepared)
    inputs = probe(opened.loaded)
    if isinstance(kept, PreTrainedModel):
        record_forms(kept)
    with atomic_folder(output) as temporary:
        again = write_model(kept, opened.loaded.tokenizer or opened.loaded.processor, temporary)
        _check_same_output(kept, again, inputs)
        found = found | {"files": {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)}
                                   for path in sorted(temporary.iterdir()) if path.is_file()}}
        write_json(temporary / RECORD, found)
        write_atomic(temporary / "README.md", compression_card(output.name, found))
        write_atomic(temporary / "report.html", compression_page(output.name, found))
    return found


@torch.no_grad()
def _check_same_output(kept: torch.nn.Module, again: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    first, second = (_output_of(model.eval()(**inputs)) for model in (kept, again))
    worst = float(((first - second).abs() / (1 + first.abs())).max())
    if not worst <= CLOSE:  # NaN is no small difference
        raise RefusedError("the saved model does not say what the one in memory says, so that it is not written", got=worst,
                           hint="This is a fault of deltaloom, or of the model's class.")


def _output_of(output: Any) -> torch.Tensor:
    found = output.get("logits")
    return (output.last_hidden_state if found is None else found).float()


def file_hash(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(source: str) -> str:
    """The model as it may be published: a hub id or bundled name as it is, of a folder only the last part."""
    return Path(source).name if os.path.isdir(source) else base_model(source)  # noqa: PTH112
