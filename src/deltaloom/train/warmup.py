"""Before the first step of a new run: methods whose initial values come from gradients see those of a few batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deltaloom.deltas.base import WarmUp
from deltaloom.events import Acted, Emitter
from deltaloom.sites import Site
from deltaloom.train.modes import training_mode
from deltaloom.train.state import keep_random_states
from deltaloom.tuned import Tuned

T = TypeVar("T")


def warm_up(tuned: Tuned, batches: Iterable[T], loss: Callable[[T], Tensor], emit: Emitter, name: str | None = None) -> int:
    """Show a lane's methods the gradients of batches, as many as they ask for; gives back how many were used.

    `loss` gives the loss of a batch. Nothing is trained, no random state changes, and dropout is off.
    """
    waiting = tuned.warm_ups(name)
    most = max((each.batches for each in waiting), default=0)
    if not most:
        return 0
    used = 0
    with ExitStack() as stack:
        stack.enter_context(keep_random_states())
        stack.enter_context(training_mode(tuned, False))
        stack.enter_context(torch.enable_grad())
        for site, _ in tuned.pairs(name):
            module = tuned.model.get_submodule(site.path)
            stack.callback(module.register_forward_hook(_watcher(site, waiting)).remove)
        for batch in batches:
            loss(batch).backward()
            used += 1
            if used == most:
                break
    tuned.zero_grad(set_to_none=True)
    for each in waiting:
        each.finish()
    emit(Acted(step=0, action="warm_up", reason=f"initial values from the gradients of {used} batches"))
    return used


def _watcher(site: Site, waiting: list[WarmUp]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not args or not isinstance(output, Tensor) or not output.requires_grad or not args[0].is_floating_point():
            return
        x = args[0].detach()

        def see(gradient: Tensor) -> None:
            own = gradient if site.part is None else gradient[..., slice(*site.part)]
            for each in waiting:
                each.observe(site, x.reshape(-1, x.shape[-1]).float(), own.reshape(-1, own.shape[-1]).float())

        output.register_hook(see)

    return watch
