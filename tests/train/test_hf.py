"""Hugging Face's Trainer with the callback: the same training as ours, penalties and controllers included."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from deltaloom.deltas.lora import LoRA
from deltaloom.deltas.prefix import Prefix
from deltaloom.errors import DeltaloomError, RefusedError, SettingsError
from deltaloom.tuned import Tuned, attach
from tests.toys import toy, toy_batch
from tests.train.pieces import ToyController, ToyMethod, assert_all_differ, assert_same, small, state_of

transformers = pytest.importorskip("transformers")
from deltaloom.train.hf import trainer_callback  # noqa: E402

# The Trainer loads torch's own pickles of its optimizer, and accelerate asks for pinned memory where there is no accelerator.
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

ROWS = [{name: tensor[0] for name, tensor in toy_batch("bert", rows=1, seed=seed).items()} for seed in range(24)]
for number, row in enumerate(ROWS):
    row["labels"] = torch.tensor(number % 3)


def arguments(folder, **options):
    values = {"output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "report_to": [],
              "save_strategy": "no", "logging_strategy": "no", "remove_unused_columns": False, "use_cpu": True, "seed": 1,
              "max_grad_norm": 0.0, "disable_tqdm": True, "lr_scheduler_type": "constant", "optim": "sgd"}
    return transformers.TrainingArguments(**(values | options))


def trained(tuned: Tuned, folder, *, clip=None, scaled: bool | None = None, resume: str | None = None, rows=ROWS, **options):
    trainer = transformers.Trainer(model=tuned, args=arguments(folder, **options), train_dataset=rows,
                                   callbacks=[trainer_callback(tuned, clip=clip)])
    trainer.loss_is_scaled_for_ga = scaled
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def bert(*methods) -> Tuned:
    return attach(toy("bert"), methods, seed=2)


def watched(tuned: Tuned) -> list[ToyController]:
    """The controllers that will be made for a tuned model."""
    made: list[ToyController] = []
    make = tuned.controllers

    def controllers(plan):
        made.clear()
        made.extend(make(plan))
        return list(made)

    tuned.controllers = controllers
    return made


def test_penalty_clipping_and_steps_are_those_of_the_book(tmp_path):
    methods = (LoRA(rank=2), ToyMethod(weight=0.05, controlled=False))
    ours, book = bert(*methods), bert(*methods)
    rows = ROWS[:4]  # one batch is all rows, so that the order does not matter
    trained(ours, tmp_path, clip=0.5, rows=rows, max_steps=3)
    parameters = list(book.delta_parameters().values())
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    for _ in range(3):
        (book(**batch).loss + book.penalty()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in book.delta_state().items():
        torch.testing.assert_close(ours.delta_state()[name], tensor, rtol=1e-4, atol=1e-6)


def test_accumulation_calls_controllers_once_a_step_and_is_one_large_batch(tmp_path):
    states = []
    for size, times in ((8, 1), (2, 4)):
        tuned = bert(LoRA(rank=2), ToyMethod(weight=0.01))
        made = watched(tuned)
        trained(tuned, tmp_path, scaled=False, per_device_train_batch_size=size, gradient_accumulation_steps=times, max_steps=3)
        assert made[0].calls == [f"{what} {step}" for step in (1, 2, 3) for what in ("backward", "step")]
        assert made[0].finished
        states.append(state_of(tuned))
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-6)


def test_checkpoints_hold_the_deltas_alone_and_resume_the_same(tmp_path):
    methods = (LoRA(rank=2, dropout=0.1), ToyMethod(weight=0.01))
    options = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole, broken = bert(*methods), bert(*methods)
    trained(whole, tmp_path / "whole", **options)
    trained(broken, tmp_path / "broken", **options)
    checkpoint = tmp_path / "broken" / "checkpoint-4"
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert len(names) == len(whole.delta_state())
    assert all(".lanes." in name for name in names)
    again = bert(*methods)
    made = watched(again)
    trained(again, tmp_path / "broken", resume=str(checkpoint), **options)
    assert_same(state_of(again), state_of(whole))
    assert len(made[0].calls) == 12


def test_a_model_with_tied_embeddings_can_be_saved(tmp_path):
    tuned = attach(small(), [LoRA(rank=2)])
    trainer = transformers.Trainer(model=tuned, args=arguments(tmp_path), callbacks=[trainer_callback(tuned)])
    trainer.save_model(str(tmp_path / "saved"))
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert len(list(file.keys())) == len(tuned.delta_state())


def test_clipping_before_penalties_is_refused_but_fine_without(tmp_path):
    with pytest.raises(SettingsError, match="max_grad_norm"):
        trained(bert(ToyMethod(weight=0.1, controlled=False)), tmp_path, max_grad_norm=1.0)
    with pytest.raises(SettingsError, match="clip="):
        trained(bert(ToyMethod()), tmp_path, max_grad_norm=1.0)
    trained(bert(LoRA(rank=1)), tmp_path, max_grad_norm=1.0, max_steps=1)


def test_deltas_without_gradients_become_warnings(tmp_path):
    tuned = bert(LoRA(rank=1, targets=["query", "value"]))
    frozen = next(iter(tuned.delta_parameters().values()))
    callback = trainer_callback(tuned)
    trainer = transformers.Trainer(model=tuned, args=arguments(tmp_path, max_steps=1), train_dataset=ROWS, callbacks=[callback])
    frozen.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with pytest.warns(UserWarning, match="without a gradient"):
        trainer.train()


def test_an_optimizer_of_other_parameters_is_an_error(tmp_path):
    """trl#6700 and PEFT's own guide: an optimizer made before the deltas holds none of them, and the run goes on."""
    tuned = bert(LoRA(rank=1))
    stale = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    trainer = transformers.Trainer(model=tuned, args=arguments(tmp_path), train_dataset=ROWS, optimizers=(stale, None),
                                   callbacks=[trainer_callback(tuned)])
    with pytest.raises(DeltaloomError, match="changed no trainable parameter"):
        trainer.train()


def test_deltas_that_someone_froze_are_an_error(tmp_path):
    """trl#3926: a trainer froze an adapter that it was given."""
    tuned = bert(LoRA(rank=1))
    trainer = transformers.Trainer(model=tuned, args=arguments(tmp_path), train_dataset=ROWS, callbacks=[trainer_callback(tuned)])
    tuned.requires_grad_(False)
    with pytest.raises(RefusedError, match="no trainable parameter"):
        trainer.train()


def test_the_trainer_can_load_the_best_delta_at_the_end(tmp_path):
    """peft#1607, transformers#24096: adapters and `load_best_model_at_end` did not go together."""
    tuned = attach(toy("bert"), [LoRA(rank=2), Prefix(length=2)], "named", seed=2)
    scores, seen = iter([3.0, 5.0, 1.0]), []

    def measure(prediction):
        seen.append(state_of(tuned))
        return {"score": next(scores)}

    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "label_names": ["labels"],
               "load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    trainer = transformers.Trainer(model=tuned, args=arguments(tmp_path, **options), train_dataset=ROWS, eval_dataset=ROWS[:4],
                                   compute_metrics=measure, callbacks=[trainer_callback(tuned)])
    trainer.train()
    assert_all_differ(seen[1], seen[2])
    assert_same(state_of(tuned), seen[1])
