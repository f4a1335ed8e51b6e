"""THE FOLDER IS THE REGISTRY: one file per codec, a way in which floating-point tensors travel."""

from __future__ import annotations

from functools import lru_cache

from deltaloom.private.wire.codecs.base import Codec
from deltaloom.registry import class_named, names_in

PACKAGE = "deltaloom.private.wire.codecs"


def codec_names() -> list[str]:
    """The names of all codecs, sorted."""
    return names_in(PACKAGE)


@lru_cache(maxsize=16)
def codec_named(name: str) -> Codec:
    """The codec of that name.

    Raises:
        SettingsError: no such codec.
    """
    return class_named(PACKAGE, name, Codec, "codec")()  # type: ignore[type-abstract]
