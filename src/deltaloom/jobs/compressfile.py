"""What `deltaloom compress` is to do: from a run file of its own, or from a model and the settings of one step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from deltaloom.compress.base import Compressor, compressor_from
from deltaloom.data.settings import DataSettings
from deltaloom.errors import SettingsError
from deltaloom.jobs.runfile import apply_override, read_mapping, read_yaml
from deltaloom.settings import Settings

ENDINGS = (".yaml", ".yml")
DISTILLING = "distil"  # the step that --distil FILE adds
OPTION = re.compile(r"--([a-z][a-z0-9-]*)(?:=(.*))?", re.DOTALL)


class CompressFile(Settings):
    """The top level of a run file for `deltaloom compress`."""

    model: str
    task: str | None = Field(None, description="what the model is for; default: the task of the head that it has")
    data: dict[str, Any] = Field(default_factory=dict, description="train: calibration rows; eval: held-out rows, for the report")
    compress: tuple[dict[str, Any], ...] = Field(min_length=1, description="the steps, in this order: [{method: NAME, ...}]")
    calibration: int = Field(128, ge=1, description="rows that steps look at; steps that train take all of them")
    precision: Literal["stored", "auto", "fp32", "bf16"] = Field("stored", description="of the model; stored: as it is saved")
    seed: int = Field(0, ge=0, lt=2**31)
    output: str | None = None


@dataclass(frozen=True)
class CompressRun:
    """A parsed file: its settings, the steps, and the folder that relative paths start at."""

    file: CompressFile
    steps: tuple[Compressor, ...]
    data: DataSettings
    base: Path


def read_compress_file(path: Path, overrides: Sequence[str] = ()) -> CompressRun:
    """A run file with `key.path=value` overrides applied.

    Raises:
        SettingsError: no file, no YAML mapping, an unknown key, a step that does not exist or has wrong settings.
    """
    values = read_mapping(path, CompressFile.model_fields)
    for override in overrides:
        apply_override(values, override, tuple(CompressFile.model_fields))
    return parse_compress(values, base=path.resolve().parent)


def parse_compress(values: dict[str, Any], *, base: Path) -> CompressRun:
    """The same from a mapping, as a library user has it.

    Raises:
        SettingsError: as `read_compress_file`.
    """
    file = CompressFile.parse(values, "run file")
    steps = tuple(compressor_from(entry, f"compress.{index}") for index, entry in enumerate(file.compress))
    return CompressRun(file, steps, DataSettings.parse(file.data, "data"), base)


def split_arguments(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(the one positional argument, settings) of `MODEL --key value --other-key=value --flag`; values are YAML.

    Raises:
        SettingsError: no positional argument, or several.
    """
    positional: list[str] = []
    settings: dict[str, Any] = {}
    left = list(arguments)
    while left:
        word = left.pop(0)
        option = OPTION.fullmatch(word)
        if option is None:
            positional.append(word)
            continue
        key, text = option.group(1).replace("-", "_"), option.group(2)
        if text is None:
            text = left.pop(0) if left and not OPTION.fullmatch(left[0]) else "true"
        settings[key] = read_yaml(text, f"the value of --{option.group(1)}")
    if len(positional) != 1:
        raise SettingsError("compress takes one model or one run file", got=" ".join(positional) or "none",
                            hint="For example: deltaloom compress MODEL -o DIR --method NAME")
    return positional[0], settings


def run_of(source: str, method: str | None, options: dict[str, Any], overrides: Sequence[str] = (), *,
           top: dict[str, Any], distil: str | None = None) -> CompressRun:
    """A run file where `source` is one, else one step on the model that `source` names.

    `options` and overrides are the step's settings (`data.KEY=VALUE`: those of the rows); `top` are further keys of the run
    file, None where they are not given; `distil` is a file of rows on which the result learns from the original.

    Raises:
        SettingsError: no method, a setting that it does not have, one given twice, or flags that a run file says itself.
    """
    given = {key: value for key, value in top.items() if value is not None}
    if source.endswith(ENDINGS):
        flags = [name for name in (method and "method", distil and "distil", *options, *given) if name and name != "output"]
        if flags:
            raise SettingsError("a run file says itself what is done, so that an option has no place here", got=f"--{flags[0]}",
                                hint="Use -s key.path=value, for example -s compress.0.ratio=0.5.")
        output = [f"output={given['output']}"] if "output" in given else []
        return read_compress_file(Path(source), [*overrides, *output])
    if method is None:
        raise SettingsError("no method is given", hint="Name one with --method, or a run file (.yaml) with a section compress.")
    holder: dict[str, Any] = {"data": dict(given.pop("data", {})), "step": {}}
    for override in overrides:
        apply_override(holder, override if override.startswith("data.") else f"step.{override}", tuple(holder))
    data, step = holder["data"], holder["step"]
    twice = sorted(options.keys() & step.keys())
    if twice:
        raise SettingsError("a setting is given twice", got=twice[0])
    steps = [{"method": method} | step | options]
    if distil is not None:
        if data.get("train") not in (None, distil):
            raise SettingsError("--data and --distil name different files, and all steps see the same rows", got=distil,
                                legal=data["train"], hint="Name the file once.")
        data["train"] = distil
        steps.append({"method": DISTILLING})
    return parse_compress(given | {"model": source, "data": data, "compress": steps}, base=Path.cwd())
