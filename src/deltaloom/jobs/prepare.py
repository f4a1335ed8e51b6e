"""From a run file to everything that training needs: rows, examples, the model and its deltas. Shared by tune and plan.

Data comes first, because most mistakes are there and reading it is quick; the model is loaded only when the data is right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from deltaloom import attention
from deltaloom.checkpoint.native import base_note
from deltaloom.checkpoint.record import DeltaRecord
from deltaloom.compact.face import model_bytes, parameter_count
from deltaloom.data.encode import Example
from deltaloom.data.facts import data_facts, overlap
from deltaloom.data.labels import LabelMap
from deltaloom.data.read import Data, read_data
from deltaloom.data.settings import DataSettings
from deltaloom.deltas.base import Method, method_record, methods_from
from deltaloom.deltas.full import Full
from deltaloom.deltas.measured import default_rate
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.evaluate.base import Task, task_named, task_names
from deltaloom.jobs.budget import BudgetSettings
from deltaloom.jobs.runfile import Run
from deltaloom.models import LoadedModel, auto_precision, load_model
from deltaloom.models.compact import form_of
from deltaloom.models.settings import BaseSettings
from deltaloom.sites import head_paths
from deltaloom.train.settings import TrainSettings
from deltaloom.train.strategy import StrategyPlan, strategy_from

Say = Callable[[str], None]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Parts:
    """The sections of a run file, each parsed by its own part."""

    task: type[Task]
    data: DataSettings
    methods: tuple[Method, ...]
    train: TrainSettings
    base: BaseSettings
    continued: Path | None  # the delta that training goes on from
    strategy: StrategyPlan | None = None
    budget: BudgetSettings = field(default_factory=BudgetSettings)


@dataclass
class Prepared:
    """Everything before the first step."""

    run: Run
    parts: Parts
    rows: Data
    task: Task
    loaded: LoadedModel
    examples: list[Example]
    held: list[Example]
    facts: dict[str, Any]
    precision: str
    model_parameters: int  # of the loaded model, before anything is attached; of a quantised one as if it were dense
    model_bytes: int  # that these take
    notes: list[tuple[str, str]] = field(default_factory=list)  # (kind, message) of warnings

    @cached_property
    def waiting(self) -> tuple[Method, ...]:
        """Methods that a strategy keeps frozen until it needs them; the same objects at every call."""
        parts = self.parts
        return () if parts.strategy is None or parts.continued is not None else parts.strategy.waiting(parts.methods)

    @property
    def labels(self) -> LabelMap | None:
        """The names of the classes, where the task has them."""
        return self.task.targets.labels


def parse_parts(run: Run) -> Parts:
    """Every section checked.

    Raises:
        SettingsError: a section has problems; all of that section at once.
    """
    file = run.file
    if file.task is None:
        raise SettingsError("task is missing in the run file", legal=task_names(), hint="For example: task: causal-lm")
    task = task_named(file.task)
    data = DataSettings.parse(file.data, "data")
    train = TrainSettings.parse(file.train, "train")
    strategy = strategy_from(file.strategy, train)
    if strategy is not None and strategy.metric is not None:
        train = train.model_copy(update={"metric": strategy.metric})  # the target is what the run is judged by
    base = BaseSettings.parse(file.base, "base")
    budget = BudgetSettings.parse(file.budget, "budget")
    entries = [dict(entry) for entry in file.deltas]
    if not entries:
        raise SettingsError("deltas names no method", hint="`deltaloom methods` lists them; write: deltas: [{method: NAME}]")
    if not any("from" in entry for entry in entries):
        methods = tuple(method.settled(run.base) for method in methods_from(entries))
        return Parts(task, data, methods, _with_rate(train, methods, task), base, None, strategy, budget)
    if len(entries) > 1 or set(entries[0]) != {"from"}:
        raise SettingsError("deltas: an entry with 'from' stands alone and takes no further settings", got=entries,
                            hint="Its methods are those of the delta that training goes on from.")
    return Parts(task, data, (), train, base, located(str(entries[0]["from"]), run.base), strategy, budget)


def _with_rate(train: TrainSettings, methods: Sequence[Method], task: type[Task]) -> TrainSettings:
    """The settings with the learning rate that was measured (with AdamW) for these methods, where the run file names none."""
    if "learning_rate" in train.model_fields_set or train.optimizer != "adamw":
        return train
    rate = default_rate([method_record(method) for method in methods], generates=task.generates)
    return train.model_copy(update={"learning_rate": rate})


def prepare(run: Run, parts: Parts, *, say: Say, record: DeltaRecord | None = None, device: str = "cpu") -> Prepared:
    """Rows read, model loaded, rows encoded, facts gathered; `record` is that of a delta that training goes on from.

    The model is loaded on the CPU, in the precision that suits `device`.

    Raises:
        RefusedError: that delta is for another task. DataError, SettingsError, CheckpointError: data, settings or model.
    """
    kind = parts.task
    if record is not None and record.base.task != kind.name:
        raise RefusedError("the delta was trained for another task", got=kind.name, legal=record.base.task)
    known = LabelMap(tuple(record.base.labels)) if record is not None and record.base.labels else None
    rows = read_data(parts.data, run.base, accepts=kind.formats, numbers=kind.numbers, seed=run.file.seed)
    evaluation = rows.eval.rows if rows.eval is not None else ()
    say(f"Data: {len(rows.train)} rows, {len(evaluation)} for evaluation; {rows.train.detected}")
    targets = kind.prepare(parts.data, rows.train.rows, evaluation, known)
    precision, dtype, why = chosen_precision(parts.train.precision, device)
    torch.manual_seed(run.file.seed)  # a new head takes its values from the global generator
    labels = list(targets.labels.names) if targets.labels else None
    loaded = load_model(model_source(run), task=kind.name, labels=labels, dtype=dtype, quantise=parts.base.quantise)
    form = form_of(loaded.model)
    stored = f", linears stored as {form}" if form else ""
    say(f"Model: {loaded.source}, {type(loaded.model).__name__}, {precision}{why}{stored}")
    task = kind(parts.data, targets, loaded.model.config, tokenizer=loaded.tokenizer, processor=loaded.processor)
    examples, held = task.encode(rows.train.rows), task.encode(evaluation)
    facts = data_facts(rows.train, examples, rows.eval, held, tokenizer=loaded.tokenizer, labels=targets.labels)
    notes = [("model", note) for note in (*loaded.notes, *task.notes)] + [("data", text) for text in facts["warnings"]]
    if record is not None and record.data is not None:
        facts["continued"] = overlap(record.data, facts)
        if facts["continued"]["known_tokens"] < 0.5:
            share = facts["continued"]["known_tokens"]
            notes.append(("overlap", f"only {share:.0%} of this data's vocabulary occurred in the data of the earlier delta"))
    other = base_note(loaded.model, record.base) if record is not None else None
    notes += [("base", other)] if other else []
    notes += _use_fast_attention(loaded)
    if parts.train.packing:
        attention.check_packable(loaded.model)
        task.pack(examples[:1])
    return Prepared(run, parts, rows, task, loaded, examples, held, facts, precision,
                    parameter_count(loaded.model), model_bytes(loaded.model), notes)


def head_methods(loaded: LoadedModel, methods: tuple[Method, ...]) -> list[Method]:
    """Full tuning of the layers that the task adds: heads outside the backbone, and layers that the checkpoint lacked.

    A method that replaces whole layers and reaches these itself is left to do it.
    """
    # a language model's head is part of the pretrained model
    paths = [] if loaded.model.get_output_embeddings() is not None else head_paths(loaded.model)
    paths += [name.rpartition(".")[0] for name in loaded.new_parameters]
    covered = {site.path for method in methods if isinstance(method, Full) for site in method.sites(loaded.model)}
    wanted = [path for path in dict.fromkeys(paths) if path and path not in covered]
    return [Full(targets=tuple("re:" + re.escape(path) for path in wanted))] if wanted else []


def model_source(run: Run) -> str:
    """The model as the run file names it; a folder or GGUF file relative to the run file is found there."""
    near = run.base / run.file.model
    return str(near) if near.exists() else run.file.model


def located(name: str, base: Path) -> Path:
    """A path of the run file: relative to the run file's folder, or as given."""
    near = base / Path(name).expanduser()
    return near if near.exists() else Path(name).expanduser()


def chosen_precision(wanted: str, device: str = "cpu") -> tuple[str, torch.dtype, str]:
    """(name, dtype, reason) for `precision: auto | fp32 | bf16`."""
    if wanted == "auto":
        found = auto_precision(device)
        return found.name, found.dtype, f" ({found.reason})"
    return wanted, DTYPES[wanted], ""


def _use_fast_attention(loaded: LoadedModel) -> list[tuple[str, str]]:
    """Switch to our attention function where the family allows it; it picks the faster path by length."""
    try:
        attention.install(loaded.model)
    except RefusedError as error:
        return [("attention", f"transformers' own attention is used: {error}")]
    return []
