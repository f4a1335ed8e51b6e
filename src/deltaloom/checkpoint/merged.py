"""A merged model as a plain folder that transformers loads, read again before it gets its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaloom.errors import RefusedError
from deltaloom.files import atomic_folder
from deltaloom.models.compact import apply_forms, quantisation_of
from deltaloom.models.quiet import quiet_transformers


def save_merged(model: nn.Module, tokenizer: Any, folder: Path | str, dtype: torch.dtype | None = None, *,
                replace: bool = False) -> int:
    """Write a model (`with tuned.bare() as model`) and its tokenizer or image processor; gives back the bytes written.

    `dtype` is the type of the stored weights, the model's own by default. The folder is loaded again by the model's own class
    before it takes its name, and every tensor compared: nothing that was changed can be lost on the way.

    Raises:
        RefusedError: the model cannot be stored as a plain one, with the tensors that would be lost or changed.
    """
    with atomic_folder(Path(folder), replace=replace) as temporary:
        write_model(model, tokenizer, temporary, dtype)
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def write_model(model: nn.Module, tokenizer: Any, folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Write a model and its tokenizer into a folder that is not finished yet; gives back the model as it was loaded again.

    Raises:
        RefusedError: as `save_merged`.
    """
    if not isinstance(model, PreTrainedModel):
        raise RefusedError("only a model of transformers can be saved as a plain one", got=type(model).__name__)
    state = _cast(model.state_dict(), dtype)
    _refuse_extra_biases(model)
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=dict(state))
        if dtype is not None:
            _set_dtype(folder / "config.json", dtype)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read
        return _compare(type(model), folder, state)


def _cast(state: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The floating tensors in another type; tensors that share their memory go on sharing it."""
    if dtype is None:
        return state
    made: dict[tuple[Any, ...], Tensor] = {}
    found = {}
    for key, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if place not in made:
            made[place] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        found[key] = made[place]
    return found


def _refuse_extra_biases(model: PreTrainedModel) -> None:
    """Biases that the class does not make from its configuration: it would leave them out when it loads."""
    with torch.device("meta"):
        made = type(model)(model.config)
    recorded = quantisation_of(model)
    if recorded is not None:
        apply_forms(made, recorded.layers)
    plain = set(made.state_dict())
    extra = sorted(set(model.state_dict()) - plain)
    if extra:
        raise RefusedError("transformers' class has no place for tensors that merging made, and would leave them out",
                           problems=extra[:20], hint="Keep the delta next to the model.")


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _compare(cls: type[PreTrainedModel], folder: Path, expected: dict[str, Tensor]) -> PreTrainedModel:
    loaded: Any = cls.from_pretrained(folder, dtype="auto", output_loading_info=True, local_files_only=True)
    again: PreTrainedModel = loaded[0]
    info = loaded[1]
    found = again.state_dict()
    problems = [f"{kind.replace('_keys', '')}: {key}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
                for key in sorted(map(str, info[kind]))]
    problems += [f"lost: {key}" for key in sorted(expected.keys() - found.keys())]
    problems += [f"changed: {key}" for key in sorted(expected.keys() & found.keys())
                 if found[key].dtype != expected[key].dtype or not torch.equal(found[key], expected[key].cpu())]
    if problems:
        raise RefusedError("transformers does not load this model as it is, so that it is not written", problems=problems[:20],
                           hint="Keep the delta next to the model.")
    return again
