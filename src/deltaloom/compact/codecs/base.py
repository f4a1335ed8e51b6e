"""The contract of codecs: a matrix in fewer bits, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaloom.errors import RefusedError, SettingsError, did_you_mean
from deltaloom.registry import class_named, names_in
from deltaloom.settings import Settings

PACKAGE = "deltaloom.compact.codecs"
CHUNK = 2 ** 20  # elements that are encoded or decoded at once: what they need besides in float32 stays in the cache
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Codec(Settings, ABC):
    """Settings of one way to store a weight (d_out, d_in). One file each; `name` is the file's name."""

    name: ClassVar[str]

    @abstractmethod
    def shapes(self, d_out: int, d_in: int) -> Shapes:
        """Shape and type of each tensor that `encode` gives for a weight of this shape."""

    @abstractmethod
    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for weight (d_out, d_in), computed in float32.

        Raises:
            RefusedError: it is no matrix of finite numbers, or it is empty.
        """

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], d_out: int, d_in: int, dtype: torch.dtype) -> Tensor:
        """The weight (d_out, d_in): computed in float32, rounded once to `dtype`."""

    def encoded_bytes(self, d_out: int, d_in: int) -> int:
        """Bytes of all tensors for a weight of this shape."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.shapes(d_out, d_in).values())


def codec_names() -> list[str]:
    """The names of all codecs."""
    return names_in(PACKAGE)


def codec_from(record: object, where: str = "codec") -> Codec:
    """The codec that a record states: {"codec": name, setting: value, ...}; a name alone is one with default settings.

    Raises:
        SettingsError: no such codec, an unknown setting or an illegal value; `where` is the key path that it names.
    """
    record = {"codec": record} if isinstance(record, str) else record
    name = record.get("codec") if isinstance(record, dict) else None
    legal = codec_names()
    if not isinstance(record, dict) or not isinstance(name, str) or name not in legal:
        hint = did_you_mean(name, legal) if isinstance(name, str) else None
        raise SettingsError(f"{where}: unknown codec", got=name if isinstance(name, str) else record, legal=legal, hint=hint)
    cls = class_named(PACKAGE, name, Codec, "codec")  # type: ignore[type-abstract]
    return cls.parse({key: value for key, value in record.items() if key != "codec"}, where)


def codec_record(codec: Codec) -> dict[str, Any]:
    """The record that `codec_from` reads back: the name and every setting."""
    return {"codec": codec.name, **codec.as_dict()}


def checked_weight(weight: Tensor) -> Tensor:
    """A weight that can be encoded, without its graph.

    Raises:
        RefusedError: it is no matrix of finite floating-point numbers, or it is empty.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise RefusedError("only a matrix of numbers can be quantised", got=f"{tuple(weight.shape)} {weight.dtype}")
    if not bool(weight.isfinite().all()):
        raise RefusedError("a weight that is not finite cannot be quantised", got=f"{tuple(weight.shape)} {weight.dtype}",
                           hint="The model's file is damaged, or its training went wrong.")
    return weight.detach()


def pair_table(levels: Tensor) -> Tensor:
    """For each byte its two 4-bit levels, the high one first: (256,) of 64 bits, each two float32 values side by side.

    One look-up per byte is several times as fast as one per level.
    """
    byte = torch.arange(256, device=levels.device)
    return torch.stack((levels[byte >> 4], levels[byte & 15]), 1).float().contiguous().view(torch.int64).view(-1)


def looked_up(table: Tensor, codes: Tensor) -> Tensor:
    """The float32 values (2 n,) of bytes (n,) by a table of pairs."""
    return table.index_select(0, codes.int()).view(torch.float32)


def packed(codes: Tensor) -> Tensor:
    """4-bit codes (..., n) of uint8, n even, two to a byte (..., n / 2), the first in the high half."""
    return (codes[..., ::2] << 4) | codes[..., 1::2]
