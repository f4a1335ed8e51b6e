"""Several saved deltas on one base at once: composed in order, or their weighted sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from deltaloom.checkpoint.convert import combine_folders, put_back
from deltaloom.checkpoint.peft import load_any
from deltaloom.checkpoint.record import DeltaRecord
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.tuned import Tuned, restore, stacked


def parsed_weights(text: str | None, count: int) -> list[float]:
    """The numbers of "0.5,0.5"; equal shares without a text.

    Raises:
        SettingsError: not numbers, or not as many as there are deltas.
    """
    if text is None:
        return [1.0 / count] * count
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise SettingsError("weights must be numbers, separated by commas", got=text,
                            hint="For example: --weights 0.5,0.5") from None
    if len(numbers) != count:
        raise SettingsError("each delta needs one weight", got=f"{len(numbers)} weights", legal=f"{count} weights")
    return numbers


def check_alike(records: Sequence[DeltaRecord | None]) -> None:
    """Refuse deltas of different tasks or classes: one model cannot answer for both.

    Raises:
        RefusedError: they differ.
    """
    known = [record.base for record in records if record is not None]
    for what, values in (("tasks", {base.task for base in known}), ("classes", {tuple(base.labels or ()) for base in known})):
        if len(values) > 1:
            raise RefusedError(f"the deltas are for different {what}", got=" and ".join(sorted(map(str, values))),
                               hint="Name deltas of one task, or use them one at a time.")


def load_several(model: nn.Module, folders: Sequence[Path], weights: Sequence[float] | None, *,
                 fingerprint: str | None = None) -> Tuned:
    """The deltas of several folders as one: composed in order, or with `weights` their weighted sum, which is exact.

    Composed, each delta sees the model with those before it. A sum takes deltas that are affine changes of weights.

    Raises:
        CheckpointError: a delta is damaged or belongs to another base. RefusedError: the deltas contradict one another, or have
        no sum.
    """
    if weights is not None:
        return put_back(model, combine_folders(model, folders, weights))
    tuned = load_any(model, folders[0], "d0", fingerprint=fingerprint)
    try:
        for index, folder in enumerate(folders[1:], 1):
            load_any(tuned, folder, f"d{index}", fingerprint=fingerprint)
        saved = [tuned.saved(name) for name in tuned.lanes]
    finally:
        tuned.detach()
    heads = Counter(site for delta in saved for part in delta.methods if part.is_head for site in part.sites)
    twice = [site for site, count in heads.items() if count > 1]
    if twice:
        raise RefusedError("several of these deltas bring the same head, and a model has one", problems=twice[:8],
                           hint="Give --weights: heads are then summed as the deltas are.")
    return restore(model, stacked(saved))
