"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["linear", "cosine", "constant"]


def factor(step: int, total: int, shape: Shape, warmup: float) -> float:
    """Share of the highest learning rate that step `step` (counted from 1) of `total` takes, in (0, 1].

    It rises over the first ceil(warmup * total) steps to 1, then falls towards 0, which the step after the last would have:
    so the first and the last step both do something.
    """
    rising = min(math.ceil(warmup * total - 1e-9), total - 1)
    if step <= rising:
        return step / (rising + 1)
    if shape == "constant":
        return 1.0
    done = min((step - 1 - rising) / (total - rising), 1.0)
    return 1.0 - done if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
