"""`load_model`: a frozen model for a task, with its tokenizer or image processor, and everything that was not as expected.

Only safetensors and GGUF are read, code that comes with a model is never run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from deltaloom.compact import codec_from
from deltaloom.errors import CheckpointError, DeltaloomError, RefusedError, SettingsError, did_you_mean
from deltaloom.models.compact import CompactConfig, quantise_model
from deltaloom.models.gguf import check_gguf, gguf_arguments, gguf_tokenizer
from deltaloom.models.identity import backbone_prefix, fingerprint
from deltaloom.models.quiet import quiet_transformers
from deltaloom.models.source import Source, parse_source

AUTO_CLASSES: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "regression": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
}
LABELLED = ("sequence-classification", "token-classification", "image-classification")
# The end of the name of a class of transformers -> the task of its head.
HEADS = {"ForCausalLM": "causal-lm", "LMHeadModel": "causal-lm", "ForConditionalGeneration": "seq2seq-lm",
         "ForSequenceClassification": "sequence-classification", "ForTokenClassification": "token-classification",
         "ForImageClassification": "image-classification"}
NEW_HEAD = (*LABELLED, "regression")


@dataclass(frozen=True)
class LoadedModel:
    """A model as loaded: nothing attached, nothing frozen, in eval mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None  # None for images
    processor: Any  # the image processor, None for text
    source: str
    commit: str | None  # the hub's commit hash, where there is one
    fingerprint: str
    new_parameters: tuple[str, ...] = ()  # not in the checkpoint: newly initialised, so they have to be trained
    notes: tuple[str, ...] = ()  # what a user should know; shown as warnings


def load_model(source: str | Path, *, task: str, labels: Sequence[str] | None = None, dtype: torch.dtype | None = None,
               device: str | torch.device = "cpu", offline: bool | None = None, quantise: str | None = None) -> LoadedModel:
    """A model for a task from a hub id (`org/name@revision`), a folder, a .gguf file or `bundled:NAME`.

    `labels` in the order of their ids make a head of that size; without, the checkpoint's own head is kept. A head that
    the checkpoint lacks is initialised from torch's global generator: seed it before. `dtype` None keeps the dtype that
    the checkpoint has. `offline` None does as HF_HUB_OFFLINE says. `quantise` names a codec (`nf4`, `int8`): the linear layers
    inside the blocks are stored with it, each as it is read; embeddings, norms and heads stay as they are.

    Raises:
        CheckpointError: missing, damaged, incomplete, or not a model for this task. SettingsError: unknown task or codec, or
        labels that do not fit. RefusedError: it would have to run its own code, or is quantised already.
    """
    check_task(task, labels)
    codec = None if quantise is None else codec_from(quantise, "quantise")
    where = parse_source(source)
    if where.gguf:
        check_gguf(where.gguf)
    with quiet_transformers(), translated(where, task):
        config = load_config(where, task=task, labels=labels, offline=offline)
        arguments = _weights_arguments(where, config, quantise)
        tokenizer, processor = _load_inputs(where, task, offline)
        notes = _settle_pad_token(config, tokenizer)
        # transformers' own error for mismatched sizes names no tensor; `_review` names them all
        model, info = AUTO_CLASSES[task].from_pretrained(
            where.location, config=config, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, **_hub_arguments(where, offline), **arguments)
    new, more = _review(model, info, where, task)
    _check_vocabulary(model, tokenizer, where)
    if where.gguf and codec is not None:
        quantise_model(model, codec)
        more.append("a GGUF file is read whole before it is quantised: the peak of memory is that of the dense model")
    return LoadedModel(model=model.to(device), tokenizer=tokenizer, processor=processor, source=where.name,
                       commit=getattr(config, "_commit_hash", None), fingerprint=fingerprint(model), new_parameters=new,
                       notes=tuple(notes + more))


def _weights_arguments(where: Source, config: PreTrainedConfig, quantise: str | None) -> dict[str, Any]:
    """What `from_pretrained` needs to know of how the weights are stored, and are to be."""
    if quantise is not None and is_quantised(config):
        raise RefusedError(f"{where.name} is quantised or compressed already", got=f"quantise: {quantise}",
                           hint="Leave `quantise` out, or name the model that it was made of.")
    if where.gguf:
        return gguf_arguments(where.gguf)
    return {} if quantise is None else {"quantization_config": CompactConfig(codec=quantise)}


def is_quantised(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint's configuration says that its weights are quantised, by whatever method."""
    return getattr(config, "quantization_config", None) is not None


def check_task(task: str, labels: Sequence[str] | None) -> None:
    """Refuse an unknown task, and labels that the task cannot have."""
    if task not in AUTO_CLASSES:
        raise SettingsError("task is not known", got=task, legal=AUTO_CLASSES, hint=did_you_mean(task, AUTO_CLASSES) or None)
    if labels is None:
        return
    if task not in LABELLED:
        raise SettingsError(f"task {task} has no labels", got=list(labels))
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise SettingsError("labels must be two or more, each once", got=list(labels))


def load_config(where: Source, *, task: str, labels: Sequence[str] | None, offline: bool | None) -> PreTrainedConfig:
    """The checkpoint's configuration with the head that the task needs."""
    extra: dict[str, Any] = {"gguf_file": where.gguf.name} if where.gguf else {}
    config = AutoConfig.from_pretrained(where.location, **_hub_arguments(where, offline), **extra)
    if labels is not None:
        # id2label before label2id: setting it also sets num_labels.
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    if task == "regression":
        config.num_labels = 1
        config.problem_type = "regression"
    elif task == "sequence-classification":
        config.problem_type = "single_label_classification"
    return config


def _hub_arguments(where: Source, offline: bool | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {"trust_remote_code": False}
    if where.hub_id:
        arguments["revision"] = where.revision or "main"
    if offline:
        arguments["local_files_only"] = True
    return arguments


def _load_inputs(where: Source, task: str, offline: bool | None) -> tuple[PreTrainedTokenizerBase | None, Any]:
    """(tokenizer, None) for text, (None, image processor) for images."""
    arguments = _hub_arguments(where, offline)
    if task == "image-classification":
        # The processors on Pillow need no torchvision and resize as the models were trained.
        return None, AutoImageProcessor.from_pretrained(where.location, backend="pil", **arguments)
    if where.gguf:
        return gguf_tokenizer(where.gguf), None
    return AutoTokenizer.from_pretrained(where.location, **arguments), None


def _settle_pad_token(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Give a tokenizer without a pad token its end token, and the model's configuration the tokenizer's pad id."""
    if tokenizer is None:
        return []
    notes = []
    if tokenizer.pad_token is None:
        stand_in = tokenizer.eos_token or tokenizer.unk_token
        if stand_in is None:
            raise CheckpointError("the tokenizer has no pad token, and no eos token that could stand in for it")
        tokenizer.pad_token = stand_in
        notes.append(f"the tokenizer has no pad token: '{stand_in}' stands in for it, and batches are masked by length")
    config.pad_token_id = tokenizer.pad_token_id
    return notes


def _review(model: PreTrainedModel, info: dict[str, Any], where: Source, task: str) -> tuple[tuple[str, ...], list[str]]:
    """New parameters and notes from transformers' loading report; raises for what no task explains."""
    prefix = backbone_prefix(model)
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    new = sorted(set(info["missing_keys"]) | mismatched)
    wrong = [name for name in new if not _may_be_new(name, prefix, task)]
    parts = tuple(f"{name}." for name, _ in model.base_model.named_children() if name != "pooler")
    unexpected = sorted(info["unexpected_keys"])
    stray = [name for name in unexpected if name.removeprefix(prefix).startswith(parts)]
    problems = ([f"the model needs '{name}', which the checkpoint lacks or has in another shape" for name in wrong[:8]]
                + [f"the checkpoint has '{name}', the model has no place for it" for name in stray[:8]]
                + list(info["error_msgs"]))
    if problems:
        more = max(0, len(wrong) - 8) + max(0, len(stray) - 8)
        raise CheckpointError(f"{where.name} is not a complete model for {task}" + (f" ({more} more like these)" if more else ""),
                              problems=problems, hint="Is config.json the one of these weights, and the task the right one?")
    notes = []
    if poolers := [name for name in new if _is_pooler(name, prefix)]:
        notes.append(f"the checkpoint has no pooler: {', '.join(poolers)} start from random values")
    if unexpected:
        notes.append(f"{len(unexpected)} tensors of the checkpoint are not used for {task}: {', '.join(unexpected[:6])}"
                     + (", ..." if len(unexpected) > 6 else ""))
    return tuple(new), notes


def _may_be_new(name: str, prefix: str, task: str) -> bool:
    """Whether a parameter may be missing from the checkpoint: a task's head, or the pooler that feeds it."""
    if task not in NEW_HEAD:
        return False
    return _is_pooler(name, prefix) or (prefix != "" and not name.startswith(prefix))


def _is_pooler(name: str, prefix: str) -> bool:
    return name.startswith(f"{prefix}pooler.")


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, where: Source) -> None:
    if tokenizer is None:
        return
    rows = next(model.get_input_embeddings().parameters()).shape[0]
    if len(tokenizer) > rows:
        raise CheckpointError(f"{where.name}: the tokenizer has {len(tokenizer)} tokens, the model's embeddings {rows} rows",
                              hint="Take the tokenizer that belongs to this model.")


@contextlib.contextmanager
def translated(where: Source, task: str) -> Iterator[None]:
    """Errors of transformers and the hub, in our kinds and words."""
    try:
        yield
    except DeltaloomError:
        raise
    except (OSError, HfHubHTTPError, SafetensorError) as error:
        raise _unavailable(where, error) from error
    except (ValueError, KeyError, ImportError) as error:
        first = _first_lines(error)
        if "trust_remote_code" in str(error):
            raise RefusedError(f"{where.name} needs code of its own to load, and deltaloom runs none",
                               hint="Use an architecture that transformers has.") from error
        if first.startswith("Unrecognized configuration class"):
            raise CheckpointError(f"transformers has no {task} model of the architecture of {where.name}",
                                  hint="Choose a task that the architecture has, or another model.") from error
        raise CheckpointError(f"{where.name} cannot be loaded for {task}", got=first,
                              hint="Is this task one that the architecture has?") from error


def _unavailable(where: Source, error: Exception) -> CheckpointError:
    if not where.hub_id:
        return CheckpointError(f"{where.name} cannot be read", got=_first_lines(error))
    looked = f"Looked in {constants.HF_HUB_CACHE}"
    wanted = f"{where.hub_id}" + (f" at revision {where.revision}" if where.revision else "")
    if constants.HF_HUB_OFFLINE or "offline" in str(error).lower() or "cached files" in str(error):
        online = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "connect to the network"
        hint = f"{looked}; {online} to download it, or give a folder or bundled:NAME."
    else:
        hint = f"{looked} and on the hub; check the name, and HF_TOKEN if the model is gated or private."
    return CheckpointError(f"model {wanted} cannot be had, and there is no folder of that name", got=_first_lines(error),
                           hint=hint)


def _first_lines(error: Exception, most: int = 300) -> str:
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    text = " ".join(line for line in lines if line)
    return text if len(text) <= most else text[:most] + " ..."
