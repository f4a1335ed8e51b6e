"""What one lane of a tuned model holds: a method, and the deltas that it made; and what methods may not do together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from deltaloom.deltas.base import Attachment, InputDelta, Method
from deltaloom.errors import RefusedError


@dataclass
class Attached:
    """One method in a lane: its settings, what it made, and whether the task added it for a head."""

    method: Method
    attachment: Attachment
    is_head: bool

    def named_deltas(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of every delta by its site, then of every shared module."""
        for site, delta in self.attachment.deltas.items():
            yield site.name, delta
        for key, module in self.attachment.shared.items():
            yield f"shared.{key}", module


def state_of(made: Sequence[Attached]) -> dict[str, Tensor]:
    """All tensors of a lane by `method index:site:name`; detached, not copied."""
    return {f"{index}:{place}:{key}": tensor.detach() for index, attached in enumerate(made)
            for place, module in attached.named_deltas() for key, tensor in module.state_dict().items()}


def fit_to(made: Sequence[Attached], state: Mapping[str, Tensor]) -> None:
    """Let methods whose tensors change their sizes in training have the sizes of saved ones; values are still to be loaded."""
    for index, attached in enumerate(made):
        prefix = f"{index}:"
        attached.method.fit(attached.attachment, {key.removeprefix(prefix): tuple(tensor.shape) for key, tensor in state.items()
                                                  if key.startswith(prefix)})


def replaced_tensors(made: Sequence[Attached]) -> list[tuple[str, str]]:
    """(path of the layer, tensor) of everything that the deltas replace."""
    return [(site.path, key) for attached in made for site, delta in attached.attachment.deltas.items()
            for key in delta.override()]


def check_together(made: Sequence[Attached]) -> None:
    """Refuse methods of one lane that contradict one another."""
    twice = sorted(f"{path}.{key}" for (path, key), count in Counter(replaced_tensors(made)).items() if count > 1)
    if twice:
        raise RefusedError("two methods replace the same tensors, so that one of them would have no effect",
                           hint="Exclude these layers from the targets of one of them.", problems=twice)
    prompts = [a.method.name for a in made for delta in a.attachment.deltas.values() if isinstance(delta, InputDelta)]
    if len(prompts) > 1:
        raise RefusedError("one delta can hold one prompt only", got=", ".join(prompts))


def refuse_reentrant(modules: Iterable[nn.Module]) -> None:
    """Refuse activation checkpointing that runs blocks without a graph: where the input is frozen, no gradient comes back."""
    for module in modules:
        if module.__dict__.get("gradient_checkpointing"):
            function = module._gradient_checkpointing_func
            if not isinstance(function, partial) or function.keywords.get("use_reentrant") is False:
                return
            raise RefusedError("reentrant activation checkpointing loses the gradients of deltas in a frozen model",
                               hint="Call `tuned.checkpoint_activations()` instead.")
