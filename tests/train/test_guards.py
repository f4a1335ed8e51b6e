from __future__ import annotations

import pytest
import torch
from torch import nn

from deltaloom.deltas.lora import LoRA
from deltaloom.errors import DeltaloomError, NonFiniteError, ResourceError
from deltaloom.events import Step, Warned
from deltaloom.train.checkpoints import checkpoints
from deltaloom.train.guards import memory_errors
from deltaloom.train.settings import TrainSettings
from tests.train.pieces import LanguageTask, Log, ToyMethod, assert_same, feed, rows, run, state_of, tuned_model


class Poisoned(LanguageTask):
    """Spoils the loss, or only its gradient, from a step on, in batches that hold a row."""

    def __init__(self, row: int, how: str, after: int = 0) -> None:
        self.row, self.how, self.after, self.calls = row, how, after, 0

    def loss(self, tuned, batch):
        loss, count = super().loss(tuned, batch)
        self.calls += 1
        if self.row not in batch.rows or self.calls <= self.after:
            return loss, count
        if self.how == "gradient":
            spoiled = loss * 0.0
            return loss + torch.sqrt(spoiled.abs()), count  # finite itself; its gradient is not
        return loss * (float("nan") if self.how == "nan" else float("inf")), count


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_a_number_that_is_not_finite_stops_before_anything_is_spoiled(how, tmp_path):
    settings = TrainSettings(epochs=3, batch_size=6, save_every=1, keep_checkpoints=50)
    tuned, log = tuned_model(), Log()
    task = Poisoned(5, how, after=10)
    source = feed(settings, micro_tokens=40, place=lambda row: f"train.jsonl:{row + 1}")
    with pytest.raises(NonFiniteError) as error:
        run(tuned, settings, log, task=task, feed=source, folder=tmp_path)
    good = checkpoints(tmp_path)[-1][0]
    message = str(error.value)
    assert f"step {good + 1}" in message
    assert "train.jsonl:6" in message
    assert f"step-{good}" in message
    assert error.value.exit_code == 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tuned.delta_state().values())
    assert [event.step for event in log.of(Step)] == list(range(1, good + 1))
    assert not tuned.training


def test_only_the_micro_batch_at_fault_is_named():
    settings = TrainSettings(max_steps=1, batch_size=12)
    with pytest.raises(NonFiniteError) as error:
        run(tuned_model(), settings, task=Poisoned(5, "nan"), feed=feed(settings, rows(12), micro_tokens=1))
    assert "rows of the batch: row 5" in str(error.value)
    assert "no earlier checkpoint" in str(error.value)


def test_read_later_it_still_names_the_step_and_saves_nothing_bad(tmp_path):
    settings = TrainSettings(max_steps=8, batch_size=6, log_every=8, save_every=3)
    with pytest.raises(NonFiniteError, match="at step 5"):
        run(tuned_model(), settings, task=Poisoned(-1, "nan"), folder=tmp_path / "none", feed=spoiled_feed(settings, 5))
    assert [step for step, _ in checkpoints(tmp_path / "none")] == [3]


def spoiled_feed(settings, step):
    """A feed whose n-th step holds the row -1."""
    source = feed(settings)
    taken = source.collate

    def collate(examples, state={"steps": 0}):  # noqa: B006
        state["steps"] += 1
        if state["steps"] == step:
            examples = [type(examples[0])(-1, examples[0].input_ids, examples[0].labels, examples[0].length), *examples[1:]]
        return taken(examples)

    source.collate = collate
    return source


def test_rows_without_a_target_are_named():
    examples = [type(e)(e.row, e.input_ids, [-100] * e.length, e.length) for e in rows(4)]
    settings = TrainSettings(max_steps=1, batch_size=4)
    with pytest.raises(NonFiniteError, match="no target to learn from"):
        run(tuned_model([LoRA(rank=1)]), settings, feed=feed(settings, examples))


class Unmoved(LanguageTask):
    """A loss that depends on the deltas only in form."""

    def loss(self, tuned, batch):
        loss, count = super().loss(tuned, batch)
        return loss * 0.0, count


class Detached(LanguageTask):
    """A loss that does not depend on the deltas."""

    def loss(self, tuned, batch):
        free = torch.zeros((), requires_grad=True)
        return free * super().loss(tuned, batch)[0].detach(), torch.tensor(1)


def test_nothing_changed_after_two_steps_is_an_error():
    with pytest.raises(DeltaloomError, match="changed no trainable parameter"):
        run(tuned_model([LoRA(rank=1)]), TrainSettings(max_steps=3), task=Unmoved())


def test_no_gradient_at_all_is_an_error():
    with pytest.raises(DeltaloomError, match="no trainable parameter got a gradient"):
        run(tuned_model([LoRA(rank=1)]), TrainSettings(max_steps=3), task=Detached())


class Spare(nn.Module):
    """A model with a layer that nobody calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.layers = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, **inputs):
        return self.model(**inputs)


def test_layers_that_never_run_and_parameters_without_gradients_are_warnings():
    from tests.train.pieces import small

    tuned = tuned_model([LoRA(rank=1, targets=["c_attn", "layers.0"])], Spare(small()))
    log = Log()
    run(tuned, TrainSettings(max_steps=2, batch_size=6), log)
    found = {event.kind: event for event in log.of(Warned)}
    assert found.keys() == {"never-ran", "no-gradient"}
    assert "layers.0" in found["never-ran"].message
    assert found["no-gradient"].count == 2


def test_parameters_that_do_not_change_are_warnings():
    """peft#1402: one of LoRA's two matrices stayed all zero in a whole run, and nobody said so."""
    tuned, log = tuned_model([LoRA(rank=1)]), Log()
    name, stuck = next((name, p) for name, p in tuned.delta_parameters().items() if name.endswith(":up"))
    stuck.register_hook(torch.zeros_like)
    run(tuned, TrainSettings(max_steps=3, batch_size=6), log)
    warned = log.of(Warned)
    assert [(event.kind, event.count) for event in warned] == [("unchanged", 2)]  # the other matrix then has no gradient but zero
    assert name in warned[0].message


def test_tiny_changes_count_as_changes():
    tuned, log = tuned_model([ToyMethod(weight=1e-3, controlled=False)]), Log()
    run(tuned, TrainSettings(max_steps=2, batch_size=6, learning_rate=1e-7), log)
    assert log.of(Warned) == []


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 12 bytes")])
def test_out_of_memory_says_what_to_lower(error):
    with pytest.raises(ResourceError, match="gradient_checkpointing") as found, memory_errors([[1, 2, 3], [4]]):
        raise error
    assert found.value.exit_code == 3
    assert "3 rows" in str(found.value)


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="shape"), memory_errors([[1]]):
        raise RuntimeError("shape mismatch")


def test_a_failure_leaves_the_mode_as_it_was():
    tuned = tuned_model([LoRA(rank=1)])
    before, modes = state_of(tuned), [module.training for module in tuned.modules()]
    with pytest.raises(NonFiniteError):
        run(tuned, TrainSettings(max_steps=1, batch_size=24), task=Poisoned(5, "nan"))
    assert_same(state_of(tuned), before)
    assert [module.training for module in tuned.modules()] == modes
