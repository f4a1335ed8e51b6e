"""`DataSettings`: the `data` section of a run file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from deltaloom.errors import did_you_mean, listed
from deltaloom.settings import Settings

FormatName = Literal["auto", "text-label", "prompt-completion", "messages", "alpaca", "sharegpt", "text", "tokens", "image"]
NAMES = ("text", "text_pair", "label", "prompt", "completion", "messages", "conversations", "instruction", "input", "output",
         "system", "tokens", "tags", "image")


class DataSettings(Settings):
    """Which files to read, how their columns are meant, and how long an example may be."""

    train: str | list[str] | None = Field(None, description="training file, or a list of files that are concatenated")
    eval: str | list[str] | None = Field(None, description="evaluation file or files")
    eval_fraction: Annotated[float, Field(gt=0, le=0.5)] | None = Field(
        None, description="share of the training rows kept for evaluation when there is no eval file")
    format: FormatName = Field("auto", description="what the columns are; auto decides by their names")
    columns: dict[str, str] = Field(default_factory=dict, description="our name: the file's column, e.g. {prompt: mr}")
    template: str | None = Field(None, description="text with {column} places that becomes the prompt or the text")
    max_length: int = Field(256, ge=4, le=1_000_000, description="tokens per example; longer ones are cut, and counted")
    class_weights: Literal["none", "balanced"] = Field("none", description="balanced: rare classes weigh more in the loss")
    max_rows: int | None = Field(None, ge=1, description="use only the first rows of train, and of eval")

    @field_validator("train", "eval")
    @classmethod
    def _no_empty_list(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None and (not value or not all(files_of(value))):
            raise ValueError("must name at least one file, none of them empty")
        return value

    @field_validator("columns")
    @classmethod
    def _known_names(cls, value: dict[str, str]) -> dict[str, str]:
        unknown = [name for name in value if name not in NAMES]
        if unknown:
            near = did_you_mean(unknown[0], NAMES)
            raise ValueError(f"unknown names {listed(unknown)}; legal: {', '.join(NAMES)}. {near}".strip())
        twice = {column for column in value.values() if list(value.values()).count(column) > 1}
        if twice:
            raise ValueError(f"one column cannot serve two names: {listed(sorted(twice))}")
        return value

    @model_validator(mode="after")
    def _one_source_of_eval(self) -> DataSettings:
        if self.eval is not None and self.eval_fraction is not None:
            raise ValueError("eval and eval_fraction exclude each other: name an evaluation file or split one off, not both")
        return self


def files_of(value: str | list[str] | None) -> list[str]:
    """The files of `train` or `eval` as a list, as they were given."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def resolved(name: str, base: Path) -> Path:
    """The path of a file of the settings: `~` expanded, a relative one taken from the run file's folder `base`."""
    return base / Path(name).expanduser()
