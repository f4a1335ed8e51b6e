"""Training and evaluation mode of a tuned model, and gradient checkpointing, switched for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from deltaloom.errors import RefusedError
from deltaloom.kernels.dropout import SeededDropout
from deltaloom.train.state import keep_random_states
from deltaloom.tuned import Tuned


@contextmanager
def training_mode(tuned: Tuned, on: bool) -> Iterator[None]:
    """Training mode (the model's own dropout is active, as in Hugging Face's Trainer) or evaluation mode.

    Batch norms stay in evaluation mode: their running statistics belong to the frozen model.
    """
    before = {module: module.training for module in tuned.modules()}
    tuned.train(on)
    for module in tuned.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    try:
        yield
    finally:
        for module, was in before.items():
            module.training = was


@contextmanager
def leaving_no_trace(tuned: Tuned) -> Iterator[None]:
    """Steps are tried within the block: random states, what deltas count while training, and gradients are then as before."""
    held = [(buffer, buffer.clone()) for part in tuned.attached() for _, module in part.named_deltas()
            for buffer in module.buffers()]
    with keep_random_states():
        try:
            yield
        finally:
            for buffer, before in held:
                buffer.copy_(before)
            tuned.zero_grad(set_to_none=True)


@contextmanager
def faster_dropout(tuned: Tuned) -> Iterator[None]:
    """The model's own dropout layers replaced, within the block, by ones that draw their masks faster; same probability."""
    # by their parents and not by paths, which change when layers around them get or lose their first delta
    places = [(parent, name, module) for parent in list(tuned.modules()) for name, module in parent.named_children()
              if type(module) is nn.Dropout]
    faster = {id(module): SeededDropout(module.p).train(module.training) for _, _, module in places}
    for parent, name, module in places:
        setattr(parent, name, faster[id(module)])
    try:
        yield
    finally:
        for parent, name, module in places:
            module.train(faster[id(module)].training)
            setattr(parent, name, module)


@contextmanager
def gradient_checkpointing(tuned: Tuned, on: bool) -> Iterator[None]:
    """Compute the blocks' activations again in the backward pass, if `on`.

    Raises:
        RefusedError: the model cannot.
    """
    if not on:
        yield
        return
    model: nn.Module = tuned.model
    if not isinstance(model, PreTrainedModel) or not model.supports_gradient_checkpointing:
        raise RefusedError(f"{type(model).__name__} has no gradient checkpointing",
                           hint="Set train.gradient_checkpointing to false.")
    # Not reentrant: works although the embeddings are frozen, and draws the same random numbers again.
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # else the backward pass would go down to the embeddings for nothing
    try:
        yield
    finally:
        model.activation_checkpointing_disable()
