"""Notes the mask or the packed lengths of each call of a watched module, for deltas that look at whole rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltaloom.attention import Segments
from deltaloom.deltas._layout import BatchLayout, Places
from deltaloom.errors import RefusedError

MASK, PACKED = "attention_mask", "segments"


class Watchers:
    """Hooks on the modules that a layout watches: it is the module itself that is called, also by `generate`, so none is missed.

    No wrapper can stand there: the watched module may be the model itself.
    """

    def __init__(self, layout: BatchLayout) -> None:
        self.layout = layout
        self.handles: dict[str, RemovableHandle] = {}

    def watch(self, model: nn.Module) -> None:
        """Put a hook on each watched module that has none."""
        for path in self.layout.places:
            if path not in self.handles:
                note = _Note(self.layout, path)
                self.handles[path] = model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)

    def stop(self) -> None:
        """Take all hooks away, and forget what was watched."""
        for handle in self.handles.values():
            handle.remove()
        self.handles = {}
        self.layout.places = {}


class _Note:
    def __init__(self, layout: BatchLayout, path: str) -> None:
        self.layout = layout
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep what this call says of its rows."""
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        mask, packed = given.get(MASK), kwargs.get(PACKED)
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise RefusedError("a gate that averages over rows needs an attention mask that says which tokens are real",
                               got=str(got), legal="(batch, time)")
        self.layout.places[self.path] = Places(None if mask is None else mask != 0,
                                               packed.lengths if isinstance(packed, Segments) else None)
