"""A model with its tokenizer from a hub id, a folder, a GGUF file or a bundled model; its fingerprint and dtype.

The names below load their module on first use, so that listing bundled models does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from deltaloom.models.bundled import Bundled, bundled_models, bundled_path, get_bundled

if TYPE_CHECKING:
    from deltaloom.models.facts import ModelFacts, describe, meta_model, own_task
    from deltaloom.models.identity import fingerprint
    from deltaloom.models.load import LoadedModel, load_model
    from deltaloom.models.precision import Precision, auto_precision

__all__ = ["Bundled", "LoadedModel", "ModelFacts", "Precision", "auto_precision", "bundled_models", "bundled_path",
           "describe", "fingerprint", "get_bundled", "load_model", "meta_model", "own_task"]

_HOMES = {
    "LoadedModel": "load", "load_model": "load",
    "ModelFacts": "facts", "describe": "facts", "meta_model": "facts", "own_task": "facts",
    "fingerprint": "identity",
    "Precision": "precision", "auto_precision": "precision",
}


def __getattr__(name: str) -> Any:
    """The public name, from its module, which may import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'deltaloom.models' has no attribute '{name}'")
    return getattr(importlib.import_module(f"deltaloom.models.{_HOMES[name]}"), name)
