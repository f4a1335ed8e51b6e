"""The optimizer of the delta parameters, its state by name, and gradient norms; all of it in few large kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from deltaloom.deltas.base import KeepRows, keep_rows
from deltaloom.errors import CheckpointError, RefusedError
from deltaloom.train.settings import TrainSettings


def make_optimizer(parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> Optimizer:
    """AdamW or SGD over the delta parameters; vectors and scalars (biases, norms, gates) get no weight decay.

    AdamW is PyTorch's fused one, which on a CPU too takes a quarter of the time of the next best.

    Raises:
        RefusedError: there is nothing to train.
    """
    if not parameters:
        raise RefusedError("there is no trainable parameter", hint="Attach a method with trainable deltas.")
    groups = _groups(parameters, settings)
    if settings.optimizer == "sgd":
        return SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, fused=True)
    return AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True)


def add_parameters(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> None:
    """Let the optimizer train these too; it begins with them as it does with all at the start."""
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for group in _groups({name: p for name, p in parameters.items() if id(p) not in known}, settings):
        optimizer.add_param_group(group)


def _groups(parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> list[dict[str, Any]]:
    groups = [{"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": settings.weight_decay},
              {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The L2 norm of all gradients together, a scalar that is not read here (reading waits for an accelerator)."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(parameters: Sequence[nn.Parameter], most: float, norm: Tensor) -> None:
    """Scale all gradients so that their norm, known to be `norm`, is at most `most`."""
    nn.utils.clip_grads_with_norm_(parameters, most, norm)


def divide_gradients(parameters: Sequence[nn.Parameter], by: Tensor | float) -> None:
    """Divide all gradients by one number."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads:
        torch._foreach_div_(grads, by)


def optimizer_state(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """The optimizer's tensors by the parameters' names: what goes into a checkpoint."""
    return {name: dict(optimizer.state[parameter]) for name, parameter in parameters.items() if parameter in optimizer.state}


def load_optimizer_state(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter],
                         state: Mapping[str, dict[str, Any]]) -> None:
    """Take back what `optimizer_state` gave.

    Raises:
        CheckpointError: it names parameters that are not trained here.
    """
    unknown = [name for name in state if name not in parameters]
    if unknown:
        raise CheckpointError("the optimizer's state is of other parameters", problems=[f"unexpected: {n}" for n in unknown[:20]])
    for name, values in state.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {key: _placed(value, parameter) for key, value in values.items()}


def row_keeper(optimizer: Optimizer, changed: Callable[[], None] = lambda: None) -> KeepRows:
    """Replaces a parameter by one of some of its rows, in the optimizer too, with what that holds of these rows."""

    def keep(parameter: nn.Parameter, rows: Tensor, axis: int = 0) -> nn.Parameter:
        kept = keep_rows(parameter, rows, axis)
        for group in optimizer.param_groups:
            group["params"] = [kept if own is parameter else own for own in group["params"]]
        if parameter in optimizer.state:
            held = optimizer.state.pop(parameter)
            optimizer.state[kept] = {key: value.index_select(axis, rows).contiguous()
                                     if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape else value
                                     for key, value in held.items()}
        changed()
        return kept

    return keep


def _placed(value: Any, parameter: nn.Parameter) -> Any:
    # The step counter lies next to the parameter for a fused optimizer, as the moments do; clones are freshly aligned.
    if not isinstance(value, Tensor):
        return value
    if value.shape == parameter.shape:  # with the parameter's strides: a fused optimizer goes through both memories in order
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    return value.to(parameter.device).clone()
