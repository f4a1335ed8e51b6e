"""What the trained prompts of several runs have in common, as a decoder that further tasks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaloom.checkpoint import native
from deltaloom.deltas._decoder import TENSORS, write_decoder
from deltaloom.deltas.prompt import Prompt
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.files import check_new
from deltaloom.jobs.folder import folder_bytes
from deltaloom.jobs.opening import needs_delta
from deltaloom.report.text import byte_size, count, share, table_text

FEWEST = 2


def learn(sources: Sequence[str], output: Path, *, numbers: int = 250, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Write a decoder of at most `numbers` trained numbers a task, from runs whose deltas are one prompt each.

    Principal components of the rows of all prompts, each less the mean of its place: as many directions as fit, and as the rows
    have.

    Raises:
        SettingsError: too few runs, or fewer numbers than a prompt has rows. RefusedError: a delta is no prompt, or the prompts
        belong to different backbones or have different lengths.
    """
    if len(sources) < FEWEST or len({str(Path(source).resolve()) for source in sources}) < len(sources):
        raise SettingsError("a subspace is learned from several runs, each named once", got=list(sources),
                            legal=f"at least {FEWEST}; eight or more are worth it")
    check_new(output)
    prompts: list[Tensor] = []
    fingerprints: dict[str, str] = {}
    sizes: list[int] = []
    for source in sources:
        folder = needs_delta(source)
        saved, record = native.read(folder)
        fingerprints[source] = record.base.fingerprint
        prompts.append(_rows(source, saved))
        sizes.append(record.tensors.bytes)
    check_alike(dict(zip(sources, prompts, strict=True)), fingerprints)
    stacked = torch.stack(prompts).double()
    length, width = stacked.shape[1:]
    if numbers < length:
        raise SettingsError("a prompt needs at least one number for each of its rows", got=numbers, legal=f"{length} or more",
                            hint="Train shorter prompts, or allow more numbers.")
    mean, directions, shares = directions_of(stacked, numbers // length)
    explained = float(shares.sum())
    names = tuple(str(source) for source in sources)
    written = write_decoder(output, mean, directions, fingerprint=next(iter(fingerprints.values())), runs=names,
                            explained=explained)
    kept = _kept(stacked, mean, directions)
    found: dict[str, Any] = {
        "path": str(output), "runs": list(names), "length": length, "width": width, "directions": written.directions,
        "numbers": length * written.directions, "explained": explained, "kept": dict(zip(names, kept, strict=True)),
        "decoder_bytes": folder_bytes(output), "prompt_bytes": max(sizes), "coordinate_bytes": 4 * length * written.directions}
    say(table_text(("run", "prompt's file", "of its change kept"),
                   [(name, byte_size(size), share(part)) for name, size, part in zip(names, sizes, kept, strict=True)],
                   f"{written.directions} directions hold {share(explained)} of the variance of {len(names)} prompts"))
    say(f"A task then takes {count(found['numbers'])} numbers ({byte_size(found['coordinate_bytes'])}) "
        f"instead of {count(length * width)} ({byte_size(4 * length * width)}).")
    say(f"Decoder: {output} ({byte_size((output / TENSORS).stat().st_size)}), shared by all tasks on this backbone")
    return found


def directions_of(prompts: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mean (length, width), directions (k, width), their shares of the variance (k,)) of prompts (tasks, length, width).

    A direction is a unit vector times the deviation of the rows along it, so that numbers of size one make changes as large as
    those that were learned. k is at most `most`, and at most the rank of the rows.

    Raises:
        RefusedError: the prompts do not differ.
    """
    mean = prompts.mean(0)
    rows = (prompts - mean).flatten(0, 1)
    _, values, axes = torch.linalg.svd(rows, full_matrices=False)
    rank = int((values > values[0] * 1e-6).sum()) if values[0] > 1e-12 else 0
    if not rank:
        raise RefusedError("these prompts are all the same, so that nothing is to be learned from them")
    k = min(most, rank)
    signs = axes[:k].gather(1, axes[:k].abs().argmax(1, keepdim=True)).sign()  # the decomposition leaves them open
    return mean, signs * axes[:k] * (values[:k, None] / len(rows) ** 0.5), values[:k].square() / values.square().sum()


def _kept(prompts: Tensor, mean: Tensor, directions: Tensor) -> list[float]:
    """Of each prompt, how much of the squared difference to the mean lies in the directions."""
    units = directions / directions.norm(dim=1, keepdim=True)
    apart = prompts - mean
    return ((apart @ units.T).square().sum((1, 2)) / apart.square().sum((1, 2)).clamp_min(1e-30)).tolist()


def _rows(source: str, saved: Any) -> Tensor:
    found = [index for index, part in enumerate(saved.methods) if isinstance(part.method, Prompt)]
    others = [part.method.name for part in saved.methods if not part.is_head and not isinstance(part.method, Prompt)]
    if len(found) != 1 or others:
        raise RefusedError("a subspace of prompts is learned from runs with a prompt alone", got=f"{source}: "
                           + ", ".join(part.method.name for part in saved.methods if not part.is_head),
                           hint="Train with one entry under deltas, the prompt.")
    (tensor,) = (tensor for key, tensor in saved.state.items() if key.startswith(f"{found[0]}:"))
    return tensor.detach().float()


def check_alike(prompts: dict[str, Tensor], fingerprints: dict[str, str]) -> None:
    """That prompts belong to one backbone and have one size.

    Raises:
        RefusedError: they do not.
    """
    if len(set(fingerprints.values())) > 1:
        raise RefusedError("these prompts belong to different backbones", problems=[
            f"{source}: {mark[:16]}" for source, mark in fingerprints.items()], hint="Name runs of one model.")
    if len({tuple(rows.shape) for rows in prompts.values()}) > 1:
        raise RefusedError("these prompts have different sizes", problems=[
            f"{source}: {len(rows)} rows" for source, rows in prompts.items()], hint="Train all of them with one length.")
