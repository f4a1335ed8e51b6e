"""A delta apart from any model: what is saved and loaded, converted and combined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from deltaloom.deltas.base import AttachContext, Attachment, Method
from deltaloom.errors import CheckpointError, TargetError
from deltaloom.sites import Site, all_sites


@dataclass(frozen=True)
class SavedMethod:
    """One method of a delta, with the names of the sites that it has: targets might match others later."""

    method: Method
    sites: tuple[str, ...]
    is_head: bool = False


@dataclass(frozen=True)
class SavedDelta:
    """Methods in order, and all tensors by `method index:site:name`, as `Tuned.delta_state` gives them."""

    methods: tuple[SavedMethod, ...]
    state: Mapping[str, Tensor]


def stacked(parts: Sequence[SavedDelta]) -> SavedDelta:
    """Several deltas as one that composes them in order."""
    methods: list[SavedMethod] = []
    state: dict[str, Tensor] = {}
    for part in parts:
        for key, tensor in part.state.items():
            index, _, rest = key.partition(":")
            state[f"{int(index) + len(methods)}:{rest}"] = tensor
        methods += part.methods
    return SavedDelta(tuple(methods), state)


def attach_saved(saved: SavedMethod, context: AttachContext) -> Attachment:
    """The deltas of one method at its sites; sizes and values are still to be taken from the saved tensors.

    Raises:
        CheckpointError: sites that the model does not have.
    """
    known = _known_sites(saved.method, context.model)
    missing = [name for name in saved.sites if name not in known]
    if missing:
        raise CheckpointError(f"{len(missing)} sites of '{saved.method.name}' are not in this model", problems=missing[:20],
                              hint="The delta belongs to another base, or was made for another task.")
    # a method may add deltas at places that are no targets of its own: it will do so again
    sites = [known[name] for name in saved.sites if known[name].kind in saved.method.kinds]
    return saved.method.attach(sites, context)


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """What keeps saved tensors from being loaded: missing, unexpected and differently shaped ones."""
    problems = [f"missing: {key} {tuple(own[key].shape)}" for key in own if key not in state]
    problems += [f"unexpected: {key} {tuple(state[key].shape)}" for key in state if key not in own]
    problems += [f"shape of {key}: {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} here"
                 for key in own if key in state and own[key].shape != state[key].shape]
    return problems


def _known_sites(method: Method, model: nn.Module) -> dict[str, Site]:
    known = {site.name: site for site in all_sites(model)}
    try:  # a method may have sites of its own making
        return known | {site.name: site for site in method.sites(model)}
    except TargetError:
        return known
