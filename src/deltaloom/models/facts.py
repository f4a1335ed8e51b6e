"""Facts about a model from its configuration alone: nothing but config.json (or a GGUF header) is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from deltaloom.compact.face import model_bytes, parameter_count
from deltaloom.models.compact import METHOD, CompactConfig, apply_forms, apply_ties
from deltaloom.models.load import AUTO_CLASSES, HEADS, check_task, is_quantised, load_config, translated
from deltaloom.models.quiet import quiet_transformers
from deltaloom.models.source import Source, parse_source


@dataclass(frozen=True)
class ModelFacts:
    """A model that was never loaded."""

    source: str
    architecture: str  # the transformers class for the task
    model_type: str
    parameters: int  # tied ones once
    layers: int | None
    d_model: int | None
    vocabulary: int | None
    dtype: torch.dtype  # of the checkpoint, as its configuration says; fp32 if it does not
    weight_bytes: int  # of all parameters in the checkpoint's dtype, compact layers as they are stored



def describe(source: str | Path, *, task: str = "causal-lm", labels: Sequence[str] | None = None,
             offline: bool | None = None) -> ModelFacts:
    """The facts of a model for a task.

    Raises:
        CheckpointError, SettingsError, RefusedError: as `load_model`.
    """
    where = parse_source(source)
    model = _on_meta(where, task, labels, offline)
    config = model.config.get_text_config()
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    sizes = config.to_dict() | {key: getattr(config, key) for key in config.attribute_map}
    return ModelFacts(
        source=where.name, architecture=type(model).__name__, model_type=model.config.model_type,
        parameters=parameter_count(model),
        layers=sizes.get("num_hidden_layers"), d_model=sizes.get("hidden_size"), vocabulary=sizes.get("vocab_size"),
        dtype=dtype, weight_bytes=model_bytes(model.to(dtype)))  # type: ignore[arg-type]


def own_task(source: str | Path, *, offline: bool | None = None) -> str | None:
    """The task whose head a checkpoint has, by the class that its configuration names; None for a bare backbone.

    Raises:
        CheckpointError, SettingsError, RefusedError: as `load_model`.
    """
    where = parse_source(source)
    with quiet_transformers(), translated(where, "any task"):
        config = load_config(where, task="causal-lm", labels=None, offline=offline)
    name = next(iter(config.architectures or ()), "")
    if where.gguf is not None and not name:
        return "causal-lm"
    found = next((task for ending, task in HEADS.items() if name.endswith(ending)), None)
    return "regression" if found == "sequence-classification" and config.num_labels == 1 else found


def meta_model(source: str | Path, *, task: str, labels: Sequence[str] | None = None,
               offline: bool | None = None) -> PreTrainedModel:
    """The model's modules and shapes without values (torch's meta device): enough to find sites and count parameters."""
    return _on_meta(parse_source(source), task, labels, offline)


def _on_meta(where: Source, task: str, labels: Sequence[str] | None, offline: bool | None) -> PreTrainedModel:
    check_task(task, labels)
    with quiet_transformers(), translated(where, task):
        config = load_config(where, task=task, labels=labels, offline=offline)
        with torch.device("meta"):
            model: PreTrainedModel = AUTO_CLASSES[task].from_config(config, trust_remote_code=False)
            record = config.quantization_config if is_quantised(config) else {}
            if isinstance(record, dict) and record.get("quant_method") == METHOD:
                recorded = CompactConfig.from_dict(record)
                apply_forms(model, recorded.layers)
                apply_ties(model, recorded.tied)
            return model
