"""PEFT's files, read and written without PEFT: adapter_config.json and adapter_model.safetensors.

What a method is called there is data of the method (`peft_types`, `peft_fields`, `to_peft`, `from_peft`). Here is what all
adapters have in common: the prefix of names, the general fields, the modules that are saved whole, and the checks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from deltaloom.checkpoint import native
from deltaloom.checkpoint.header import read_json
from deltaloom.checkpoint.native import check_finite, read_tensors
from deltaloom.deltas.base import Method, PeftPart, PeftReading
from deltaloom.errors import CheckpointError, RefusedError, did_you_mean
from deltaloom.files import atomic_folder
from deltaloom.registry import class_named, names_in
from deltaloom.tuned import SavedDelta, SavedMethod, Tuned, restore
from deltaloom.tuned.model import check_untouched

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."
PROMPT = "prompt_embeddings"    # without a prefix; what lies beside it has the shorter one, for PEFT wraps no layer then
PROMPT_PREFIX = "base_model."
PATH_FIELDS = ("target_modules", "feedforward_modules")
SAVED = "modules_to_save"
HEADS = ("classifier", "score")  # PEFT saves modules that end so for its two tasks of classification, named or not
CLASSIFIES = ("SEQ_CLS", "TOKEN_CLS")
TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS", "ForCausalLM": "CAUSAL_LM",
         "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}  # by the end of the model's class name


def write_peft(tuned: Tuned, folder: Path | str, name: str | None = None, *, source: str | None = None,
               replace: bool = False) -> int:
    """Write a lane as a PEFT adapter that computes the same; gives back the bytes written.

    `source` is what PEFT and its users find the base by: a hub id or a folder.

    Raises:
        RefusedError: PEFT cannot hold it as one adapter, with the reason; the folder is not empty; a delta is merged.
    """
    with tuned.bare() as model:
        if tuned.merged is not None:
            raise RefusedError("a delta is merged into the weights", got=tuned.merged, hint="Call `tuned.unmerge()` first.")
        parts = [attached.method.to_peft(attached.attachment, model) for attached in tuned.attached(name)]
        part = _one_adapter(parts, [attached.method.name for attached in tuned.attached(name)])
        part = _with_whole_modules(part, model)
        config = {"auto_mapping": None, "base_model_name_or_path": source, "inference_mode": True, "revision": None} | part.config
        for field in PATH_FIELDS:
            if config.get(field):
                config[field] = short_names(model, config[field], config.get(SAVED) or ())
    prefix = PROMPT_PREFIX if PROMPT in part.tensors else PREFIX
    tensors = {key if key == PROMPT else prefix + key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
               for key, tensor in part.tensors.items()}
    check_finite(tensors)
    blob = to_bytes(tensors, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with atomic_folder(Path(folder), replace=replace) as temporary:
        (temporary / TENSORS).write_bytes(blob)
        (temporary / CONFIG).write_text(text, encoding="utf-8")
    return len(blob) + len(text.encode())


def load_peft(model: nn.Module, folder: Path | str, name: str = "default") -> Tuned:
    """Put a PEFT adapter on its base; if `model` is a tuned model, it becomes a further delta of it, and is used.

    Raises:
        CheckpointError: damaged, or of another base. RefusedError: it has what no method here has, by name.
    """
    if isinstance(model, Tuned):
        with model.bare() as untouched:
            saved = read_peft(Path(folder), untouched)
    else:
        check_untouched(model)
        saved = read_peft(Path(folder), model)
    return restore(model, saved, name)


def read_peft(folder: Path, model: nn.Module) -> SavedDelta:
    """A PEFT adapter as a delta for an untouched model: the main method, then what the adapter holds beside it.

    Raises:
        CheckpointError, RefusedError: as `load_peft`; tensors that nothing reads are among the reasons.
    """
    adapter = PeftPart(_read_config(folder), _read_adapter_tensors(folder))
    readings = [_main_reading(adapter, model)]
    for method in _peft_methods():
        if any(adapter.config.get(field) not in (None, "none", [], {}) for field in method.peft_fields):
            beside = method.from_peft(adapter, model)
            if beside is not None:
                readings.append(beside)
    unread = sorted(set(adapter.tensors) - frozenset().union(*(reading.used for reading in readings)))
    if unread:
        raise CheckpointError(f"{TENSORS} has {len(unread)} tensors that its configuration does not explain",
                              problems=unread[:20],
                              hint="PEFT would leave them out without a word; the adapter may be of another version or base.")
    readings = [reading for reading in readings if reading.state]
    by_name = {path for path, _ in model.named_modules()}
    methods = [SavedMethod(reading.method, tuple(reading.state), _is_head(reading, by_name)) for reading in readings]
    state = {f"{index}:{site}:{key}": tensor for index, reading in enumerate(readings)
             for site, tensors in reading.state.items() for key, tensor in tensors.items()}
    return SavedDelta(tuple(methods), state)


def load_any(model: nn.Module, folder: Path | str, name: str = "default", *, fingerprint: str | None = None,
             strict: bool = True) -> Tuned:
    """Put a saved delta of either format on its base, as `native.load` and `load_peft` do; PEFT's files name no fingerprint."""
    if (Path(folder) / CONFIG).is_file():
        return load_peft(model, folder, name)
    return native.load(model, folder, name, fingerprint=fingerprint, strict=strict)


def short_names(model: nn.Module, paths: Iterable[str], saved: Iterable[str]) -> list[str]:
    """The shortest ends of paths by which PEFT finds exactly these modules; whole paths if there are none."""
    wanted = set(paths)
    every = [path for path, _ in model.named_modules()]
    outside = [path for path in every if not any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) for name in saved)]
    for length in (1, 2, 3):
        ends = {".".join(path.split(".")[-length:]) for path in wanted}
        if {path for path in outside if path in ends or any(path.endswith(f".{end}") for end in ends)} == wanted:
            return sorted(ends)
    return sorted(wanted)


def _one_adapter(parts: list[PeftPart], names: list[str]) -> PeftPart:
    """One configuration and one set of tensors: a main method, and the parts that PEFT knows as its fields."""
    mains = [part for part in parts if "peft_type" in part.config]
    if len(mains) != 1:
        reason = ("none of these methods is one of PEFT's own" if not mains
                  else "PEFT holds one method in an adapter, and these are several")
        raise RefusedError(reason, got=", ".join(names), hint="Keep the native format, or convert to a plain low-rank delta.")
    config, tensors = dict(mains[0].config), dict(mains[0].tensors)
    config.setdefault(SAVED, None)
    for part in parts:
        if part is mains[0]:
            continue
        for field, value in part.config.items():
            if field not in config:
                raise RefusedError(f"PEFT's {config['peft_type']} has no '{field}'", got=", ".join(names),
                                   hint="Keep the native format.")
            config[field] = [*(config[field] or []), *value] if isinstance(value, list) else value
        for key, tensor in part.tensors.items():
            path, _, own = key.rpartition(".")
            key = f"{path}.base_layer.{own}" if path in config.get("target_modules", ()) else key
            if key in tensors:
                raise RefusedError("two methods have the same tensor", got=key)
            tensors[key] = tensor
    both = sorted(set(config[SAVED] or ()) & set(config.get("target_modules", ())))
    if both:
        raise RefusedError("PEFT cannot replace a layer and change it by another method", problems=both[:20],
                           hint="Keep the native format.")
    if config.get("bias") == "all":
        biased = {key.rpartition(".base_layer.")[0] for key in tensors if key.endswith(".bias")}
        config["bias"] = "lora_only" if biased <= set(config.get("target_modules", ())) else "all"
    return PeftPart(config, tensors)


def _with_whole_modules(part: PeftPart, model: nn.Module) -> PeftPart:
    """Complete what PEFT saves and loads as whole modules with the base's own tensors, and state the task.

    PEFT takes every module whose path ends as a name says, and for classification its heads in any case.
    """
    task = next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), None)
    names = list(part.config.get(SAVED) or ())
    ends = [*names, *(HEADS if task in CLASSIFIES else ())]
    roots = [path for path, module in model.named_modules()
             if path and any(path.endswith(end) for end in ends) and any(True for _ in module.parameters())]
    roots = [root for root in roots if not any(root.startswith(f"{other}.") for other in roots)]
    touched = [name for name in part.config.get("target_modules", ())
               if any(f"{name}.".startswith(f"{root}.") for root in roots)]
    if touched:
        raise RefusedError("PEFT saves these modules whole, and cannot change layers in them by another method",
                           problems=touched[:20], hint="Keep the native format, or leave these layers out of the targets.")
    tensors = dict(part.tensors)
    for root in roots:
        for key, tensor in model.get_submodule(root).state_dict().items():
            tensors.setdefault(f"{root}.{key}", tensor)
    return PeftPart({**part.config, "task_type": task, SAVED: roots or None}, tensors)


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"the folder holds no {CONFIG}", got=str(folder))
    return read_json(folder / CONFIG)


def _read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    if not (folder / TENSORS).is_file():
        if (folder / PICKLED).is_file():
            raise RefusedError(f"{PICKLED} is a pickle, which can run anything when it is read; only safetensors are read",
                               got=str(folder), hint="Load it with PEFT where you trust it, and save it again: "
                               "`save_pretrained(folder)` writes safetensors.")
        raise CheckpointError(f"the folder holds {CONFIG} and no {TENSORS}", got=str(folder))
    tensors = read_tensors(folder / TENSORS)
    prefix = PROMPT_PREFIX if PROMPT in tensors else PREFIX
    odd = [key for key in tensors if key != PROMPT and not key.startswith(prefix)]
    if odd:
        raise CheckpointError(f"{TENSORS} has names that no adapter of PEFT has", legal=f"'{prefix}...' or '{PROMPT}'",
                              problems=odd[:20])
    return _without_copies({key.removeprefix(prefix): tensor for key, tensor in tensors.items()})


def _without_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the names that PEFT's `bias="all"` writes of its own wrappers around modules that are saved whole.

    Raises:
        CheckpointError: a copy that differs from the tensor under the plain name.
    """
    found = {key: tensor for key, tensor in tensors.items() if ".original_module." not in key}
    for key in [key for key in found if ".modules_to_save." in key]:
        copy = found.pop(key)
        plain = found.setdefault(key.replace(".modules_to_save.", "."), copy)
        if not torch.equal(plain, copy):
            raise CheckpointError(f"{TENSORS} holds a tensor twice, with different values", got=key)
    return found


def _peft_methods() -> list[type[Method]]:
    """The methods that know PEFT's files, by their own account."""
    found = [class_named("deltaloom.deltas", name, Method, "method") for name in names_in("deltaloom.deltas")]  # type: ignore[type-abstract]
    return [cls for cls in found if cls.peft_types or cls.peft_fields]


def _main_reading(adapter: PeftPart, model: nn.Module) -> PeftReading:
    kind = adapter.config.get("peft_type")
    legal = sorted({kind for method in _peft_methods() for kind in method.peft_types})
    if not isinstance(kind, str):
        raise CheckpointError(f"{CONFIG} names no peft_type", got=str(kind)[:80], legal=legal)
    for method in _peft_methods():
        reading = method.from_peft(adapter, model) if kind in method.peft_types else None
        if reading is not None:
            return reading
    raise RefusedError("this kind of PEFT adapter is not supported", got=kind, legal=legal, hint=did_you_mean(kind, legal))


def _is_head(reading: PeftReading, modules: set[str]) -> bool:
    """Whether all layers of a reading are in a classification head: counted apart from the delta."""
    return bool(reading.method.peft_fields) and all(
        site in modules and any(part.endswith(HEADS) for part in site.split(".")) for site in reading.state)
