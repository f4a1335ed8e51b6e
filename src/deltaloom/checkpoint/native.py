"""The native format: a delta of any methods in a folder, checked when it is read, complete or absent when it is written."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from deltaloom import __version__
from deltaloom.checkpoint.depth import group_facts
from deltaloom.checkpoint.facts import shared_facts, site_facts
from deltaloom.checkpoint.header import AGAIN, read_header
from deltaloom.checkpoint.record import (
    RECORD,
    TENSORS,
    BaseRecord,
    DeltaRecord,
    GroupFacts,
    MethodRecord,
    SharedFacts,
    SiteFacts,
    TensorsRecord,
    check_hash,
    delta_file_facts,
)
from deltaloom.deltas.base import method_from, method_record
from deltaloom.errors import CheckpointError, RefusedError, SettingsError
from deltaloom.files import atomic_folder
from deltaloom.models.compact import form_of
from deltaloom.models.identity import fingerprint as fingerprint_of
from deltaloom.settings import Settings, settings_error
from deltaloom.tuned import SavedDelta, SavedMethod, Tuned, restore
from deltaloom.tuned.model import check_untouched

SMALL = 4096  # a whole number in a method's settings may be this large even if the file holds fewer elements


def save(tuned: Tuned, folder: Path | str, name: str | None = None, *, base: Mapping[str, Any] | None = None,
         data: Mapping[str, Any] | None = None, seed: int | None = None, replace: bool = False) -> int:
    """Write a lane (the one in use by default) to a new folder; gives back the bytes written.

    `base` says which model the delta belongs to (fields of `BaseRecord`); the fingerprint is computed if it is not among them.
    `data` holds facts of the training data. With `replace` a folder of that name is exchanged for the new one.

    Raises:
        RefusedError: the folder is not empty, a delta is merged, or values are not finite. ResourceError: the disk is full.
    """
    lane = name or tuned.name
    check_finite(tuned.delta_state(lane))
    facts = dict(base or {})
    with tuned.bare() as model:
        facts.setdefault("architecture", type(model).__name__)
        facts.setdefault("quantised", form_of(model))
        if "fingerprint" not in facts:
            if tuned.merged is not None:
                raise RefusedError("a delta is merged into the weights", got=tuned.merged, hint="Call `tuned.unmerge()` first.")
            facts["fingerprint"] = fingerprint_of(model)
    return write(tuned.saved(lane), Path(folder), base=base_record(facts), data=data, seed=seed,
                 sites=site_facts(tuned, lane), shared=shared_facts(tuned, lane), groups=group_facts(tuned, lane),
                 replace=replace)


def base_record(facts: Mapping[str, Any]) -> BaseRecord:
    """Facts of a base, checked.

    Raises:
        SettingsError: an unknown fact or an illegal value.
    """
    try:
        return BaseRecord.model_validate(dict(facts))
    except ValidationError as error:
        raise settings_error(BaseRecord, error, "base") from None


def write(saved: SavedDelta, folder: Path, *, base: BaseRecord, data: Mapping[str, Any] | None = None, seed: int | None = None,
          sites: Sequence[SiteFacts] = (), shared: Sequence[SharedFacts] = (), groups: Sequence[GroupFacts] = (),
          replace: bool = False) -> int:
    """Write a delta that is apart from a model; as `save`, with what is known of its sites, shared modules and groups."""
    check_finite(saved.state)
    tensors, same = _distinct(saved.state)
    blob = to_bytes(tensors, metadata={"format": "pt"})
    record = DeltaRecord(
        deltaloom=__version__, base=base, seed=seed, sites=list(sites), shared=list(shared), groups=list(groups),
        data=None if data is None else dict(data),
        methods=[MethodRecord(settings=method_record(part.method), sites=list(part.sites), head=part.is_head)
                 for part in saved.methods],
        tensors=TensorsRecord(bytes=len(blob), sha256=hashlib.sha256(blob).hexdigest(), same=same))
    text = record.model_dump_json(indent=1, exclude_none=True) + "\n"
    with atomic_folder(folder, replace=replace) as temporary:
        (temporary / TENSORS).write_bytes(blob)
        (temporary / RECORD).write_text(text, encoding="utf-8")
    return len(blob) + len(text.encode())


def load(model: nn.Module, folder: Path | str, name: str = "default", *, fingerprint: str | None = None,
         strict: bool = True) -> Tuned:
    """Put a saved delta on its base; if `model` is a tuned model, the delta becomes a further one of it, and is used.

    `fingerprint` is that of the model, if it is known already. With `strict` off another base's fingerprint is let pass;
    sites and shapes have to fit nevertheless.

    Raises:
        CheckpointError: a file is missing or damaged, the delta belongs to another base, or does not fit; nothing has changed.
    """
    saved, record = read(Path(folder))
    if strict:
        check_base(model, record.base, fingerprint)
    note = base_note(model, record.base)
    if note:
        warnings.warn(note, stacklevel=2)
    return restore(model, saved, name)


def read(folder: Path) -> tuple[SavedDelta, DeltaRecord]:
    """A saved delta and its record, every byte checked.

    Raises:
        CheckpointError: a file is missing or damaged, a method is unknown, a value is not finite.
    """
    facts = delta_file_facts(folder)
    record = facts.record
    check_hash(folder, record)
    methods = tuple(_method(part, index, facts.parameters) for index, part in enumerate(record.methods))
    state = read_tensors(folder / TENSORS)
    for key, first in record.tensors.same.items():
        if first not in state or key in state:
            raise CheckpointError(f"{RECORD}: '{key}' cannot be the same tensor as '{first}'", got=str(folder), hint=AGAIN)
        state[key] = state[first]
    return SavedDelta(methods, state), record


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file whose header is sound and whose values are finite.

    Raises:
        CheckpointError: otherwise.
    """
    read_header(path)
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}", got=str(path), hint=AGAIN) from None
    bad = [key for key, tensor in state.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())]
    if bad:
        raise CheckpointError(f"{path.name} holds values that are not finite", got=str(path), problems=bad[:20],
                              hint="Its training went wrong: use an earlier checkpoint.")
    return state


def check_base(model: nn.Module, base: BaseRecord, fingerprint: str | None = None) -> None:
    """Compare a delta's base with a model; heads are not looked at.

    Raises:
        CheckpointError: another base, with both fingerprints. RefusedError: the model carries a merged delta.
    """
    if fingerprint is None:
        if isinstance(model, Tuned):
            if model.merged is not None:
                raise RefusedError("a delta is merged into the weights", got=model.merged, hint="Call `tuned.unmerge()` first.")
            with model.bare() as untouched:
                fingerprint = fingerprint_of(untouched)
        else:
            check_untouched(model)
            fingerprint = fingerprint_of(model)
    if fingerprint != base.fingerprint:
        source = f" ({base.source})" if base.source else ""
        raise CheckpointError(f"the delta belongs to another base{source}", got=f"fingerprint {fingerprint} of this model",
                              legal=f"fingerprint {base.fingerprint}", hint="Load the base that it was trained on.")


def base_note(model: nn.Module, base: BaseRecord) -> str | None:
    """What a user should know where a delta's base is the model, but was stored in another form; None: it is the same form.

    The fingerprint is that of the dense weights, so that a delta trained on the quantised base fits the dense one and the other
    way round: what it was trained to correct is then not quite what it meets.
    """
    form = form_of(model)
    if form == base.quantised:
        return None
    return (f"the delta was trained on the base stored as {base.quantised or 'dense weights'}, this model is stored as "
            f"{form or 'dense weights'}: its outputs will differ somewhat from those of the training")


def _method(part: MethodRecord, index: int, elements: int) -> SavedMethod:
    where = f"{RECORD}: methods.{index}"
    try:
        method = method_from(part.settings, where)
    except SettingsError as error:
        raise CheckpointError(f"{where}: {error}") from None
    largest = max(_integers(method), default=0)
    if largest > max(SMALL, elements):
        raise CheckpointError(f"{where} ({method.name}): {largest} is more than the {elements} elements of all its tensors",
                              hint=AGAIN)
    if not part.sites or len(set(part.sites)) != len(part.sites):
        raise CheckpointError(f"{where} ({method.name}) names no site, or one twice", hint=AGAIN)
    return SavedMethod(method, tuple(part.sites), part.head)


def _integers(value: object) -> list[int]:
    """Whole numbers within settings: sizes that `attach` would allocate before anything is compared with the file."""
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return [abs(value)]
    inner = value.as_dict() if isinstance(value, Settings) else value
    items = inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list | tuple) else ()
    return [number for item in items for number in _integers(item)]


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse to write values that no later reader would take.

    Raises:
        RefusedError: NaN or infinite values, or parameters whose values are elsewhere, by their names.
    """
    # what ZeRO-3 leaves of a parameter between its uses; masks may be empty
    gone = [key for key, tensor in state.items() if tensor.is_floating_point() and tensor.shape == (0,)]
    if gone:
        raise RefusedError("tensors of the delta are empty, so that it is not saved", problems=gone[:20],
                           hint="Where training is spread over processes, gather the parameters before saving; after a choice "
                                "among methods, call `deltaloom.settle(tuned)` first.")
    bad = [key for key, tensor in state.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise RefusedError("values of the delta are not finite, so that it is not saved", problems=bad[:20])


def _distinct(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to write, contiguous and on the CPU, and the names of those that are another one's memory."""
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for key, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in seen:
            same[key] = seen[place]
        else:
            seen[place] = key
            tensors[key] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return tensors, same
