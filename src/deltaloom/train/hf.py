"""Hugging Face's Trainer as the loop: a callback that adds penalties, calls controllers and keeps checkpoints small.

    trainer = Trainer(model=tuned, args=TrainingArguments(..., remove_unused_columns=False), callbacks=[trainer_callback(tuned)])
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deltaloom.deltas.base import Controller, StepPlan
from deltaloom.errors import CheckpointError, DeltaloomError, SettingsError
from deltaloom.events import Emitter, Event, Warned
from deltaloom.train.checkpoints import read_checkpoint, write_checkpoint
from deltaloom.train.guards import FirstSteps
from deltaloom.train.optimizer import clip_gradients, gradient_norm, row_keeper
from deltaloom.train.warmup import warm_up
from deltaloom.tuned import Tuned

FOLDER = "deltaloom"  # inside the Trainer's checkpoint folders


def trainer_callback(tuned: Tuned, *, clip: float | None = None, emit: Emitter | None = None) -> TrainerCallback:
    """What `Trainer(model=tuned, callbacks=[...])` needs to train any method.

    The Trainer has no place for a penalty in its loss, so its gradient is added just before the optimizer's step; controllers
    are called there too. The Trainer clips before that: where there are penalties or controllers, set its `max_grad_norm` to 0
    and give the limit as `clip` here. From now on `tuned.state_dict()` holds the deltas alone, so that the Trainer's
    checkpoints are small and can be resumed; `deltaloom.save` writes the delta itself.

    The Trainer's own traps: `remove_unused_columns=False` is needed, because it cannot see through the wrapper which inputs the
    model takes; and models whose loss ignores `num_items_in_batch` (BERT) get gradients that are too large by the number of
    accumulation steps unless `trainer.loss_is_scaled_for_ga = False`. Warnings go to `emit`, or are Python warnings.
    """
    return _Callback(tuned, clip, emit if emit is not None else Emitter([_warn]))


class _Callback(TrainerCallback):
    def __init__(self, tuned: Tuned, clip: float | None, emit: Emitter) -> None:
        self.tuned = tuned
        self.clip = clip
        self.emit = emit
        self.controllers: list[Controller] = []
        self.parameters: dict[str, nn.Parameter] = {}
        self.first: FirstSteps | None = None
        self.called = 0
        tuned.register_state_dict_post_hook(keep_deltas_only)
        tuned.register_load_state_dict_pre_hook(_fit_ranks)
        tuned.register_load_state_dict_post_hook(_miss_deltas_only)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if not state.global_step:
            self._warm_up(others.get("train_dataloader"))
        keeper = row_keeper(others["optimizer"], self._look_again) if "optimizer" in others else None
        self.controllers = self.tuned.controllers(StepPlan(state.max_steps, self.emit, keeper))
        self.parameters = self.tuned.delta_parameters()
        self.first, self.called = FirstSteps(self.tuned, self.parameters, self.emit), 0
        acts = bool(self.controllers) or self.tuned.penalty().requires_grad
        problems = []
        if acts and args.max_grad_norm:
            problems.append(f"max_grad_norm is {args.max_grad_norm}: it would clip before penalties and controllers act; "
                            "set it to 0 and give trainer_callback(tuned, clip=...)")
        if acts and args.fp16:
            problems.append("fp16 scales gradients, which penalties and controllers must not see; use bf16")
        if problems:
            raise SettingsError("the Trainer's arguments do not fit the methods of this delta", problems=problems)
        if self.controllers and state.global_step:
            self._take_controllers(_folder(args, state))

    def _warm_up(self, batches: Iterable[Any] | None) -> None:
        """Initial values from gradients, where a method wants them, of the Trainer's own first batches."""
        def loss(batch: Mapping[str, Any]) -> Tensor:
            device = self.tuned.device
            return self.tuned(**{key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}).loss

        if self.tuned.warm_ups():
            warm_up(self.tuned, batches or (), loss, self.emit)

    def _look_again(self) -> None:
        self.parameters = {}

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        penalty = self.tuned.penalty()
        if penalty.requires_grad:
            penalty.backward()
        if self.first is not None:
            self.first.after_backward()
        for controller in self.controllers:
            controller.after_backward(state.global_step + 1)
        if self.clip is not None:
            self.parameters = self.parameters or self.tuned.delta_parameters()
            parameters = list(self.parameters.values())
            clip_gradients(parameters, self.clip, gradient_norm(parameters))

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        self.called += 1
        if self.first is not None:
            self.first.after_step()  # before controllers: what they set back to zero did change
        for controller in self.controllers:
            controller.after_step(state.global_step + 1)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if self.controllers and state.is_world_process_zero:
            write_checkpoint(_folder(args, state), state.global_step,
                             {"controllers": [controller.state_dict() for controller in self.controllers]})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        for controller in self.controllers:
            controller.finish()
        if not self.called:
            raise DeltaloomError("the Trainer took no optimizer step that this callback saw", got=f"{state.global_step} steps")

    def _take_controllers(self, folder: Path) -> None:
        found = sorted(folder.glob("step-*"))
        if not found:
            raise CheckpointError("the checkpoint that the Trainer resumes from has no states of controllers", got=str(folder),
                                  hint="It has to lie in the Trainer's output_dir and to be written with this callback.")
        states = read_checkpoint(found[-1]).parts["controllers"]
        for controller, state in zip(self.controllers, states, strict=True):
            controller.load_state_dict(state)


def keep_deltas_only(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
    """A state-dict hook of a tuned model: drops the frozen model's tensors, and second names of shared ones."""
    places = tuple(f"{prefix}{place}" for place in _delta_places(module))
    seen: set[int] = set()
    for key in list(state):
        value = state[key]
        known = isinstance(value, Tensor) and value.numel() > 0 and value.data_ptr() in seen
        if known or not key.startswith(places):
            del state[key]
        elif isinstance(value, Tensor):
            seen.add(value.data_ptr())


def _miss_deltas_only(module: nn.Module, keys: Any) -> None:
    """The frozen model's tensors are not missing from a checkpoint of deltas; the Trainer stumbles over missing ones."""
    kept = module.state_dict()
    keys.missing_keys[:] = [key for key in keys.missing_keys if key in kept]


def _fit_ranks(module: nn.Module, state: Mapping[str, Any], prefix: str, *others: Any) -> None:
    """A checkpoint may be of a time when adaptive ranks were others: the deltas take its sizes before its values come."""
    names: dict[int, list[str]] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        names.setdefault(id(part), []).append(f"{prefix}{name}.")
    for lane in module.lanes.values() if isinstance(module, Tuned) else ():
        for attached in lane:
            shapes = {f"{place}:{key.removeprefix(start)}": tuple(value.shape) for place, part in attached.named_deltas()
                      for start in names.get(id(part), ()) for key, value in state.items() if key.startswith(start)}
            attached.method.fit(attached.attachment, shapes)


def _delta_places(tuned: nn.Module) -> tuple[str, ...]:
    lanes = tuned.lanes if isinstance(tuned, Tuned) else {}
    deltas = {id(delta) for lane in lanes.values() for attached in lane for _, delta in attached.named_deltas()}
    return tuple(f"{name}." for name, part in tuned.named_modules(remove_duplicate=False) if id(part) in deltas)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}" / FOLDER


def _warn(event: Event) -> None:
    if isinstance(event, Warned):
        warnings.warn(event.message, stacklevel=2)
