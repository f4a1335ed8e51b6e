"""Notes the mask or the packed lengths of each call of a watched module, for deltas that look at whole rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from deltaloom.attention import Segments
from deltaloom.deltas._layout import BatchLayout, Places, TextReader
from deltaloom.errors import RefusedError
from deltaloom.sites import input_layer
from deltaloom.tuned.adapted import Adapted

MASK, PACKED = "attention_mask", "segments"
IDS, EMBEDS, CACHE = "input_ids", "inputs_embeds", "past_key_values"
Readers = Callable[[], Iterable[TextReader]]


class Watchers:
    """Hooks on the modules that a layout watches: it is the module itself that is called, also by `generate`, so none is missed.

    No wrapper can stand there: the watched module may be the model itself.
    """

    def __init__(self, layout: BatchLayout, readers: Readers) -> None:
        self.layout = layout
        self.readers = readers  # those of the lanes in use
        self.handles: dict[str, RemovableHandle] = {}

    def watch(self, model: nn.Module) -> None:
        """Put a hook on each watched module that has none."""
        for path in self.layout.places:
            if path not in self.handles:
                note = _Note(self.layout, path, self.readers)
                self.handles[path] = model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)

    def stop(self) -> None:
        """Take all hooks away, and forget what was watched."""
        for handle in self.handles.values():
            handle.remove()
        self.handles = {}
        self.layout.places = {}


class _Note:
    def __init__(self, layout: BatchLayout, path: str, readers: Readers) -> None:
        self.layout = layout
        self.path = path
        self.readers = readers

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep what this call says of its rows."""
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        mask, packed = given.get(MASK), kwargs.get(PACKED)
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise RefusedError("a gate that averages over rows needs an attention mask that says which tokens are real",
                               got=str(got), legal="(batch, time)")
        places = Places(None if mask is None else mask != 0, packed.lengths if isinstance(packed, Segments) else None)
        self.layout.places[self.path] = places
        readers = [reader for reader in self.readers() if reader.path == self.path]
        cache = given.get(CACHE)
        if readers and not (cache is not None and cache.get_seq_length()):  # what goes on after a prompt keeps its choice
            show(readers, module, given, places, self.layout.text)


def show(readers: Iterable[TextReader], model: nn.Module, given: Mapping[str, Any], places: Places, text: Tensor | None) -> None:
    """Let readers see the input of a call: its frozen embeddings, and where its text is.

    Raises:
        RefusedError: the call has neither ids nor embeddings, or a text of another length was announced.
    """
    embeds = given.get(EMBEDS)
    if embeds is None:
        layer = input_layer(model)
        layer = layer.base if isinstance(layer, Adapted) else layer
        if given.get(IDS) is None or layer is None:
            raise RefusedError("a choice by the input text needs a text", got=type(model).__name__, legal=f"{IDS} or {EMBEDS}")
        with torch.no_grad():
            embeds = layer(given[IDS])
    mask = places.mask
    if text is not None:
        text = nn.functional.pad(text.to(embeds.device), (embeds.shape[1] - text.shape[1], 0))  # rows of a prompt are no text
        if len(text) != len(embeds):
            raise RefusedError("the labels and the inputs have another number of rows", got=len(embeds), legal=len(text))
        mask = text if mask is None else text & mask.to(embeds.device)
    for reader in readers:
        reader.read(embeds.detach(), Places(mask, places.lengths))


def is_a_decoder(model: nn.Module) -> bool:
    """Whether labels (batch, time) of a model are the tokens of its own row."""
    return isinstance(model, PreTrainedModel) and model.can_generate() and not model.config.is_encoder_decoder
