"""The run file's section `base`: how the frozen model is kept."""

from __future__ import annotations

from pydantic import Field, field_validator

from deltaloom.errors import did_you_mean
from deltaloom.registry import names_in
from deltaloom.settings import Settings


class BaseSettings(Settings):
    """How the frozen model is kept."""

    quantise: str | None = Field(None, description="store the linears inside the blocks with this codec, such as nf4 or int8")

    @field_validator("quantise")
    @classmethod
    def _check_quantise(cls, value: str | None) -> str | None:
        legal = names_in("deltaloom.compact.codecs")
        if value is not None and value not in legal:
            raise ValueError(f"unknown codec; legal: {', '.join(legal)}. {did_you_mean(value, legal)}".rstrip())
        return value
