"""What guards of rows share: clipping and sampling in float64, and the way back to the tensor's own dtype."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def clipped(x: Tensor, norm: float) -> Tensor:
    """Rows (..., d) of at most that norm, in float64: rounding must not lengthen a row beyond what the accountant assumes."""
    wide = x.double()
    return wide * (norm / wide.norm(dim=-1, keepdim=True).clamp(min=norm))


def as_constant(values: np.ndarray, like: Tensor) -> Tensor:
    """Drawn numbers as a float64 tensor of the shape and on the device of `like`; no gradient."""
    return torch.from_numpy(values).view(like.shape).to(like.device)
