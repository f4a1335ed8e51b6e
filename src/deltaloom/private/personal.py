"""A personal delta on top of the common one: its own tokens (or other deltas) after the frozen common ones.

Both lie in one lane of the party's front: first the methods of the common delta, whose tensors do not train, then the own ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deltaloom.deltas.base import Method
from deltaloom.errors import CheckpointError
from deltaloom.tuned import Tuned, attach
from deltaloom.tuned.saved import SavedDelta, misfits


def attach_personal(model: nn.Module, common: SavedDelta, own: Sequence[Method], *, tokenizer: Any = None,
                    seed: int = 0) -> Tuned:
    """A tuned front: the common delta, frozen, and after it the party's own methods, which train.

    A head in the common delta (labels at home) stays common too.

    Raises:
        CheckpointError: the common delta does not fit the front. TargetError, RefusedError: as `attach`.
    """
    tuned = attach(model, [*(part.method for part in common.methods), *own], tokenizer=tokenizer, seed=seed)
    try:
        take_common(tuned, common)
    except CheckpointError:
        tuned.detach()
        raise
    for attached in tuned.attached()[:len(common.methods)]:
        for _, module in attached.named_deltas():
            module.requires_grad_(False)
    return tuned


def take_common(tuned: Tuned, common: SavedDelta) -> None:
    """Give a front with personal deltas the common ones of a further round; the personal ones stay.

    Raises:
        CheckpointError: they do not fit; nothing is changed.
    """
    count = len(common.methods)
    own = {key: tensor for key, tensor in tuned.delta_state().items() if int(key.partition(":")[0]) < count}
    problems = misfits(own, common.state)
    if problems:
        raise CheckpointError("the common delta does not fit this front", problems=problems[:20])
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(common.state[key])
