"""After training: methods that stand for others become these, with the values that they have."""

from __future__ import annotations

from torch import Tensor

from deltaloom.deltas.base import Method
from deltaloom.errors import RefusedError
from deltaloom.tuned.attached import state_of
from deltaloom.tuned.model import Tuned
from deltaloom.tuned.saved import SavedDelta, SavedMethod


def settle(tuned: Tuned, name: str | None = None) -> tuple[Method, ...]:
    """Put plain methods in the place of those of a lane that say what they have become; gives these plain methods back.

    The lane does what it did. Its parameters are new ones: an optimizer that held the old ones is of no use any more.

    Raises:
        RefusedError: a delta is merged; nothing has been changed.
    """
    lane = name or tuned.name
    attached = tuned.attached(lane)
    outcomes = [part.method.settled_as(part.attachment) for part in attached]
    if all(outcome is None for outcome in outcomes):
        return ()
    if tuned.merged is not None:
        raise RefusedError("a delta is merged into the weights", got=tuned.merged, hint="Call `tuned.unmerge()` first.")
    methods: list[SavedMethod] = []
    state: dict[str, Tensor] = {}
    plain: list[Method] = []
    for part, outcome in zip(attached, outcomes, strict=True):
        if outcome is None:
            state |= {f"{len(methods)}:{key.partition(':')[2]}": tensor for key, tensor in state_of([part]).items()}
            methods.append(SavedMethod(part.method, tuple(site.name for site in part.attachment.deltas), part.is_head))
            continue
        for each in outcome:
            state |= {f"{len(methods)}:{site}:{key}": tensor for site, own in each.state.items() for key, tensor in own.items()}
            methods.append(SavedMethod(each.method, tuple(each.state), part.is_head))
            plain.append(each.method)
    lanes = tuned.routing.lanes
    tuned.remove(lane)
    tuned.add_saved(lane, SavedDelta(tuple(methods), state))
    tuned.routing.lanes = lanes
    return tuple(plain)
