"""Nested states as tensors and JSON, and the random states of a process: no pickle anywhere."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaloom.errors import CheckpointError

TENSOR = "$tensor"  # {"$tensor": name} stands for a tensor
ITEMS = "$items"    # {"$items": [[key, value], ...]} for a mapping whose keys are not plain strings


def pack(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON-ready data; every tensor goes into `tensors` under a name made of prefix and path.

    Mappings, lists, tuples, numbers, strings, booleans, None and tensors; a tuple comes back as a list.

    Raises:
        CheckpointError: anything else, with its path.
    """
    if isinstance(value, Tensor):
        tensors[prefix] = value
        return {TENSOR: prefix}
    if isinstance(value, dict):
        packed = [(key, pack(item, f"{prefix}/{key}", tensors)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(packed)
        return {ITEMS: [[pack(key, f"{prefix}/key", tensors), item] for key, item in packed]}
    if isinstance(value, (list, tuple)):
        return [pack(item, f"{prefix}/{index}", tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"a state holds a {type(value).__name__} at {prefix}, which no checkpoint can keep",
                          legal="tensors, numbers, strings, lists and mappings of these")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `pack` was given."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {TENSOR}:
        return tensors[value[TENSOR]]
    if value.keys() == {ITEMS}:
        return {unpack(key, tensors): unpack(item, tensors) for key, item in value[ITEMS]}
    return {key: unpack(item, tensors) for key, item in value.items()}


def seed_everything(seed: int) -> None:
    """Seed the random generators of Python, NumPy and PyTorch, on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """The states of all generators that `seed_everything` seeds."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {"python": random.getstate(),
            "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_states(states: dict[str, Any]) -> None:
    """Take back what `random_states` gave, also after `pack` and `unpack`."""
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


@contextmanager
def keep_random_states() -> Iterator[None]:
    """Put all generators back at the end of the block: what runs in it does not change what training draws."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)
