"""Decoders of prompts for tiny models."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

from deltaloom.deltas._decoder import write_decoder
from deltaloom.models.identity import fingerprint
from tests.toys import toy


@functools.cache
def decoder_for(layout: str, length: int = 3, directions: int = 4) -> str:
    """A folder with a random decoder that belongs to the toy of a layout; one for the whole session."""
    folder = Path(tempfile.mkdtemp(prefix="decoder-")) / layout
    generator = torch.Generator().manual_seed(0)
    mean, axes = (torch.randn(rows, 16, generator=generator) for rows in (length, directions))
    write_decoder(folder, mean, axes, fingerprint=fingerprint(toy(layout)), runs=("a", "b"), explained=0.5)
    return str(folder)
