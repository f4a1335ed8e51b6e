"""What goes into the blocks of a model and what comes out, on the calibration rows, token by token and without padding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from deltaloom.compress._blocks import Blocks
from deltaloom.compress.base import Work
from deltaloom.data.batches import Batch
from deltaloom.data.encode import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Seen:
    """The tokens of one batch at one block, (n, d_model) each."""

    before: Tensor
    after: Tensor


class Observer(ABC):
    """Gathers something about one block, batch by batch; made with the number of batches."""

    def __init__(self, share: int) -> None:
        raise TypeError("an observer says itself what it gathers")

    @abstractmethod
    def see(self, seen: Seen) -> None:
        """Take in the tokens of a batch."""


O = TypeVar("O", bound=Observer)  # noqa: E741


def watched(work: Work, stacks: Sequence[Blocks], make: Callable[[int], O]) -> dict[str, list[O]]:
    """One observer for each block of each stack (by path), after all calibration batches went through the model."""
    found = {stack.path: [make(len(work.batches)) for _ in stack.blocks] for stack in stacks}
    with ExitStack() as hooks, evaluating(work.model):
        current: list[Batch] = []
        for stack in stacks:
            decoder = is_decoder(work.model, stack)
            for block, observer in zip(stack.blocks, found[stack.path], strict=True):
                handle = block.register_forward_hook(_hook(observer, current, decoder), with_kwargs=True)
                hooks.callback(handle.remove)
        for batch in work.batches:
            current[:] = [batch]
            work.task.predict(work.model, batch)
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards as it was."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


def real_places(batch: Batch, decoder: bool) -> Tensor | None:
    """Which positions (batch, time) are no padding, of what the (encoder-decoder's) decoder reads or of the inputs; None: all."""
    if decoder:
        return None if batch.labels is None else batch.labels != IGNORED
    ids, mask = batch.inputs.get("input_ids"), batch.inputs.get("attention_mask")
    if mask is not None:
        return mask.bool()
    if ids is None or ids.shape[0] != len(batch.lengths):  # images, or rows packed into one
        return None
    return torch.arange(ids.shape[1], device=ids.device) < batch.lengths.to(ids.device)[:, None]


def is_decoder(model: PreTrainedModel, stack: Blocks) -> bool:
    """Whether a stack is the decoder of an encoder-decoder."""
    return bool(model.config.is_encoder_decoder) and any(module is stack.blocks[0] for module in model.get_decoder().modules())


def _hook(observer: Observer, current: list[Batch], decoder: bool) -> Callable[..., None]:
    def hook(block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        before = arguments[0] if arguments else named["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        places = real_places(current[0], decoder)
        if places is None:
            observer.see(Seen(before.flatten(0, -2), after.flatten(0, -2)))
        else:
            observer.see(Seen(before[places], after[places]))

    return hook
