"""Opening what a command names: a run folder, a delta folder (native or PEFT), or a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaloom import attention
from deltaloom.checkpoint.header import read_json
from deltaloom.checkpoint.peft import CONFIG, load_any
from deltaloom.checkpoint.record import RECORD, DeltaRecord, read_record
from deltaloom.data.labels import LabelMap
from deltaloom.data.settings import DataSettings
from deltaloom.errors import CheckpointError, RefusedError, SettingsError, listed
from deltaloom.evaluate.base import Targets, Task, task_named, task_names
from deltaloom.jobs.prepare import DTYPES, chosen_precision
from deltaloom.jobs.runfile import apply_override, read_yaml
from deltaloom.jobs.several import check_alike, load_several, parsed_weights
from deltaloom.models import LoadedModel, load_model
from deltaloom.tuned import Tuned

RUN_LIMIT = 1_000_000
# What PEFT calls the tasks; its files do not tell tags from classes of images, nor numbers from classes.
PEFT_TASKS = {"CAUSAL_LM": "causal-lm", "SEQ_2_SEQ_LM": "seq2seq-lm", "SEQ_CLS": "sequence-classification",
              "TOKEN_CLS": "token-classification"}
NOT_OF_A_ROW = ("train", "eval", "eval_fraction", "max_rows", "class_weights")  # data settings that decide no row's reading
AS_STORED = "as stored"  # the dtype that the base's checkpoint has


@dataclass
class Opened:
    """A model, with its delta if there is one, and what is known of the task."""

    loaded: LoadedModel
    tuned: Tuned | None
    task: Task
    record: DeltaRecord | None

    @property
    def model(self) -> torch.nn.Module:
        """What is called: the tuned model, or the bare one."""
        return self.tuned if self.tuned is not None else self.loaded.model


def delta_folder(source: str | Path) -> Path | None:
    """The delta's folder that a run folder or delta folder names; None for anything else."""
    path = Path(source).expanduser()
    for place in (path / "delta", path):
        if (place / RECORD).is_file() or (place / CONFIG).is_file():
            return place
    if (path / "run.yaml").is_file():
        raise CheckpointError("this run folder holds no finished delta", got=str(source),
                              hint="Finish the run: deltaloom tune RUN.yaml --resume")
    return None


def needs_delta(source: str | Path) -> Path:
    """The delta's folder.

    Raises:
        CheckpointError: there is none.
    """
    found = delta_folder(source)
    if found is None:
        raise CheckpointError("there is no delta", got=str(source), hint="Name a run folder, or a folder with delta.json.")
    return found


def open_source(source: str, *, deltas: Sequence[Path] = (), weights: str | None = None, task: str | None = None,
                model: str | None = None, dtype: str = "auto", overrides: Sequence[str] = ()) -> Opened:
    """A run or delta on its base, or a model with deltas, composed in order or summed by `weights`.

    `overrides` change settings of the data section, `task` is needed where neither the delta nor PEFT's file says it.

    Raises:
        CheckpointError: the delta is missing, damaged, or belongs to another base. SettingsError: the task is not known.
    """
    folders = [needs_delta(delta) for delta in deltas]
    if weights is not None and len(folders) < 2:
        raise SettingsError("weights are for several deltas", got=f"{weights} for {len(folders)}", hint="Repeat --delta.")
    numbers = None if weights is None else parsed_weights(weights, len(folders))
    folder = folders[0] if folders else delta_folder(source)
    record = _record_of(folder)
    check_alike([_record_of(each) for each in folders])
    name = task or (record.base.task if record is not None else _peft_task(folder))
    if name is None:
        raise SettingsError("the task is not known here", legal=task_names(), hint="Name it with --task.")
    if record is not None and record.base.task not in (None, name):
        raise RefusedError("the delta was trained for another task", got=name, legal=record.base.task)
    kind = task_named(name)
    base = model or (source if folders or folder is None else _base_of(folder, record))
    labels = record.base.labels if record is not None else None
    run = _run_of(str(deltas[0]) if deltas else source)
    if dtype == "auto" and run.get("train", {}).get("precision") in DTYPES:
        dtype = run["train"]["precision"]  # as in training, so that the numbers are those of the run
    number = None if dtype == AS_STORED else chosen_precision(dtype)[1]
    codec = record.base.quantise if record is not None else None
    loaded = load_model(base, task=name, labels=labels, dtype=number, quantise=codec)
    _fast_attention(loaded)
    tuned = None
    if len(folders) > 1:
        tuned = load_several(loaded.model, folders, numbers, fingerprint=loaded.fingerprint)
    elif folder is not None:
        tuned = load_any(loaded.model, folder, fingerprint=loaded.fingerprint)
    _check_trained(loaded, tuned, source)
    known = LabelMap(tuple(labels)) if labels else _labels_of(loaded, kind)
    settings = _data_settings(run.get("data", {}), overrides)
    bound = kind(settings, Targets(known), loaded.model.config, tokenizer=loaded.tokenizer, processor=loaded.processor)
    return Opened(loaded, tuned, bound, record)


def _record_of(folder: Path | None) -> DeltaRecord | None:
    """The record of a native delta; PEFT's have none."""
    return read_record(folder) if folder is not None and (folder / RECORD).is_file() else None


def dtype_named(name: str | None) -> torch.dtype | None:
    """fp32, bf16 or fp16; None stays None.

    Raises:
        SettingsError: another word.
    """
    if name is None:
        return None
    if name not in DTYPES:
        raise SettingsError("unknown dtype", got=name, legal=DTYPES)
    return DTYPES[name]


def _base_of(folder: Path, record: DeltaRecord | None) -> str:
    source = record.base.source if record is not None else read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(source, str) or not source:
        raise CheckpointError("the delta does not say which base it belongs to", got=str(folder), hint="Name it with --model.")
    return source


def _peft_task(folder: Path | None) -> str | None:
    """The task that PEFT's configuration names; where it names none, as for most, a language model's."""
    if folder is None:
        return None
    return PEFT_TASKS.get(str(read_json(folder / CONFIG).get("task_type")), PEFT_TASKS["CAUSAL_LM"])


def _check_trained(loaded: LoadedModel, tuned: Tuned | None, source: str) -> None:
    """Refuse a head that starts from random values: whatever it says would be noise."""
    covered = {site.path for site, _ in tuned.pairs()} if tuned is not None else set()
    missing = [name for name in loaded.new_parameters if name.rpartition(".")[0] not in covered]
    if missing:
        raise RefusedError(f"this model has no trained head for the task: {listed(missing, 4)} would be random", got=source,
                           hint="Name a run, or put a delta that was trained for the task on it with --delta.")


def _labels_of(loaded: LoadedModel, kind: type[Task]) -> LabelMap | None:
    names = getattr(loaded.model.config, "id2label", None)
    if kind.numbers or kind.generates or not names or loaded.new_parameters:
        return None
    return LabelMap(tuple(str(names[index]) for index in sorted(names)))


def _run_of(source: str) -> dict[str, Any]:
    """The sections of the run file in the run folder that is named, or whose delta is named; empty for anything else."""
    folder = Path(source).expanduser()
    path = next((place for place in (folder / "run.yaml", folder.resolve().parent / "run.yaml") if place.is_file()), None)
    if path is None or delta_folder(source) is None or path.stat().st_size > RUN_LIMIT:
        return {}
    run = read_yaml(path.read_text(encoding="utf-8", errors="replace"), path.name)
    return {key: value for key, value in run.items() if isinstance(value, dict)} if isinstance(run, dict) else {}


def _data_settings(section: dict[str, Any], overrides: Sequence[str]) -> DataSettings:
    """The data settings of the run, so that rows are read as in training, without its files."""
    values = {key: value for key, value in section.items() if key not in NOT_OF_A_ROW}
    holder: dict[str, object] = {"data": values}
    for override in overrides:
        if not apply_override(holder, override).startswith("data."):
            raise SettingsError("only settings of the data section can be changed here", got=override,
                                hint="For example: -s data.max_length=512")
    return DataSettings.parse(holder["data"], "data")


def _fast_attention(loaded: LoadedModel) -> None:
    try:
        attention.install(loaded.model)
    except RefusedError:
        return  # the model keeps transformers' own attention: slower here, and the same numbers
