"""Small things that methods need to read PEFT's files: modules by path, fields that must be neutral, names by their end.

Not a method: files whose names begin with _ are no entries of the registry.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from deltaloom.deltas.base import Method
from deltaloom.errors import CheckpointError, RefusedError, TargetError
from deltaloom.sites import Site, all_sites

# Fields of every PEFT configuration that describe, or choose modules (what they chose is in the tensors' names).
PEFT_COMMON = frozenset({"peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type",
                         "inference_mode", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform",
                         "layers_pattern", "runtime_config"})


def refuse_fields(config: Mapping[str, Any], read: Iterable[str], neutral: Mapping[str, tuple[Any, ...]] | None = None) -> None:
    """Refuse fields that are not among those read and whose value is not a neutral one.

    Raises:
        RefusedError: all of them by name.
    """
    known = set(read)
    odd = [f"{key} = {str(value)[:80]}" for key, value in config.items()
           if key not in known and value not in (None, False, "", [], {}, *(neutral or {}).get(key, ()))]
    if odd:
        raise RefusedError("fields of this PEFT adapter change its meaning and are not supported", problems=odd,
                           hint="Merge it with PEFT, or convert it there to a plain adapter.")


def whole_sites(model: nn.Module, cls: type[Method], paths: Iterable[str]) -> dict[str, Site]:
    """The sites of a method's kinds at module paths.

    Raises:
        CheckpointError: paths that the model does not have, all of them.
    """
    known = {site.path: site for site in all_sites(model) if site.kind in cls.kinds and site.part is None}
    missing = [path for path in paths if path not in known]
    if missing:
        raise CheckpointError(f"{len(missing)} modules of the adapter cannot carry '{cls.name}' in this model",
                              problems=missing[:20],
                              hint="It belongs to another base, or was made for another task's model class.")
    return {path: known[path] for path in paths}


def peft_targets(config: Mapping[str, Any], cls: type[Method], model: nn.Module, paths: Iterable[str]) -> tuple[str, ...]:
    """The adapter's own target names where they name exactly these modules here, else the whole paths.

    Raises:
        CheckpointError: the names ask for modules without tensors.
    """
    whole = tuple(paths)
    _check_complete(config, cls, model, whole)
    names = config.get("target_modules")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        return whole
    targets = tuple(sorted(names))
    try:
        found = cls(targets=targets).sites(model)
    except TargetError:
        return whole
    return targets if {site.name for site in found} == set(whole) else whole


def _check_complete(config: Mapping[str, Any], cls: type[Method], model: nn.Module, paths: tuple[str, ...]) -> None:
    """That every module which the configuration's lists of names choose has tensors; expressions are not run.

    Raises:
        CheckpointError: the modules without (a part of the file is lost, and PEFT would leave them as they are at birth).
    """
    names, out, saved = (config.get(key) or [] for key in ("target_modules", "exclude_modules", "modules_to_save"))
    if not all(isinstance(value, list) and all(isinstance(name, str) for name in value) for value in (names, out, saved)):
        return
    if config.get("layers_to_transform") is not None:
        return  # which numbers in a path count is up to layers_pattern
    sites = {site.path for site in all_sites(model) if site.kind in cls.kinds and site.part is None}
    lost = [path for path in sorted(sites.difference(paths)) if _ends(path, names) and not _ends(path, out)
            and not any(re.match(rf"(.*\.)?{re.escape(name)}($|\.)", path) for name in saved)]
    if lost:
        raise CheckpointError(f"target_modules names {len(lost)} modules of this model that have no tensors in the adapter",
                              problems=lost[:20], hint="The file is incomplete, or belongs to another base.")


def _ends(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def by_suffix(tensors: Mapping[str, Tensor], *suffixes: str) -> dict[str, Tensor]:
    """The tensors whose names end with one of the suffixes, by what stands before it."""
    return {name.removesuffix(suffix): tensor for suffix in suffixes for name, tensor in tensors.items() if name.endswith(suffix)}


def modules_ending(model: nn.Module, names: object) -> list[str]:
    """The modules that PEFT's modules_to_save names: those whose path ends so, be it in the middle of a word.

    Raises:
        CheckpointError: not a list of names, or a name that fits nothing (PEFT says nothing then).
    """
    if not names:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise CheckpointError("adapter_config.json: modules_to_save must be a list of names", got=str(names)[:80])
    paths = [path for path, _ in model.named_modules() if path and any(path.endswith(name) for name in names)]
    if not paths:
        raise CheckpointError("no module of this model is one of the adapter's modules_to_save", got=", ".join(names)[:200])
    return paths
