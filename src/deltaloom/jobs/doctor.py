"""The machine, the versions and what would not work."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from typing import Any

from deltaloom import __version__
from deltaloom.models.bundled import bundled_models, cache_root

LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "pydantic", "pyarrow", "gguf", "peft")


def examine() -> tuple[dict[str, Any], list[str]]:
    """(facts, problems): facts as text or numbers by name, problems as sentences with the next step."""
    import torch

    from deltaloom.models.precision import auto_precision

    facts: dict[str, Any] = environment()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    precision = auto_precision(device)
    facts["precision"] = f"{precision.name} ({precision.reason})"
    facts["threads"] = torch.get_num_threads()
    facts["cache"] = str(cache_root())
    here = [model.name for model in bundled_models() if model.present]
    facts["bundled models"] = ", ".join(here) or "none"
    problems = []
    free = shutil.disk_usage(_existing(str(cache_root()))).free
    facts["free disk"] = f"{free / 1e9:.1f} GB"
    if free < 2e9:
        problems.append(f"only {free / 1e9:.1f} GB of disk are free; unpacking a bundled model takes up to 1 GB")
    missing = [model.name for model in bundled_models() if not model.present]
    if missing:
        names = " ".join(missing)
        problems.append(f"bundled models not here: {names}; get them with `deltaloom models get {names}`")
    return facts, problems


def environment() -> dict[str, Any]:
    """Versions and hardware as a run records them; no host name, user or path."""
    facts: dict[str, Any] = {"deltaloom": __version__, "python": sys.version.split()[0], "platform": platform.platform(),
                             "processor": _processor(), "cores": os.cpu_count(), "memory": _memory()}
    for library in LIBRARIES:
        try:
            facts[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            facts[library] = "not installed"
    return facts


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    except (ValueError, OSError):
        return "unknown"


def _existing(path: str) -> str:
    while not os.path.exists(path):  # noqa: PTH110
        path = os.path.dirname(path)  # noqa: PTH120
    return path
