"""Prefix deltas at the attention modules of a tuned model: which lane's keys and values each row sees."""

from __future__ import annotations

from torch import nn

from deltaloom.deltas.base import PrefixDelta
from deltaloom.sites import Site
from deltaloom.tuned.adapted import Routing


def install_prefix(model: nn.Module, lane: str, site: Site, delta: PrefixDelta, routing: Routing) -> None:
    """Let the attention module at `site` see the delta's keys and values whenever the routing names the lane."""


def uninstall_prefix(model: nn.Module, lane: str, site: Site) -> None:
    """Forget a lane's prefix at an attention module."""
