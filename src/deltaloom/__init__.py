"""deltaloom: adapt a frozen pretrained model by training a small delta.

    tuned = deltaloom.attach(model, [LoRA(rank=8), Prefix(length=16)])     # train it with a loop of your own
    deltaloom.save(tuned, "delta")
    tuned = deltaloom.load(model, "delta")                                 # native or PEFT
    deltaloom.tune("run.yaml")                                             # or the whole job

Names load what they need on first use, so that importing the package does not import torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaloom.api import attach, load, preset, register_site, save, settle, trainer_callback, tune
    from deltaloom.models import load_model

__version__ = "0.1.0"

# torch keeps the CPU kernels of every shape that it met, a thousand of them: where rows differ in length, several hundred MiB
# within an epoch. Those of a few steps are enough. Read when the first product runs; what the user has set stays.
for _name, _kernels in (("LRU_CACHE_CAPACITY", "32"), ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")):
    os.environ.setdefault(_name, _kernels)

__all__ = ["attach", "load", "load_model", "preset", "register_site", "save", "settle", "trainer_callback", "tune"]

_HOMES = {"attach": "api", "load": "api", "preset": "api", "register_site": "api", "save": "api",
          "settle": "api", "trainer_callback": "api", "tune": "api", "load_model": "models"}


def __getattr__(name: str) -> Any:
    """The public name from its module; a method's settings class (such as LoRA) from its file."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"deltaloom.{_HOMES[name]}"), name)
    if name[:1].isupper():
        return importlib.import_module("deltaloom.api").method_named(name)
    raise AttributeError(f"module 'deltaloom' has no attribute '{name}'")
