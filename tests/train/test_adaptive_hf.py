"""Hugging Face's Trainer with adaptive ranks: the ranks of our own schedule, removal, and checkpoints of other sizes."""

import pytest
import torch

from deltaloom.deltas.adalora import AdaLoRA
from deltaloom.deltas.base import StepPlan
from deltaloom.errors import SettingsError
from deltaloom.tuned import attach
from tests.deltas.adaptive_pieces import Watched, kept, ranks
from tests.toys import toy
from tests.train.pieces import assert_same, state_of
from tests.train.test_hf import ROWS, arguments

transformers = pytest.importorskip("transformers")
from deltaloom.train.hf import trainer_callback  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
              pytest.mark.filterwarnings("ignore:.*before the last decision.*:UserWarning")]
METHOD = {"rank": 1, "reserve": 3, "start": 0.2, "end": 0.4, "every": 2}
OPTIONS = {"max_steps": 12, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1}
# start 2: decisions after steps 4, 6 and, the last, 8


def bert(**settings):
    return attach(toy("bert"), [AdaLoRA(**(METHOD | settings))], seed=2)


def trained(tuned, folder, *, resume=None, **options):
    trainer = transformers.Trainer(model=tuned, args=arguments(folder, **(OPTIONS | options)), train_dataset=ROWS,
                                   callbacks=[trainer_callback(tuned)])
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / f"checkpoint-{resume}"))
    return trainer


def test_the_trainer_is_our_own_loop(tmp_path):
    """The same rows at every step, the same optimizer: the same ranks and parameters."""
    trainers, own = bert(), bert()
    rows = ROWS[:4]  # one batch is all rows, so that the order does not matter
    trainer = transformers.Trainer(model=trainers, args=arguments(tmp_path, **(OPTIONS | {"save_strategy": "no"})),
                                   train_dataset=rows, callbacks=[trainer_callback(trainers)])
    trainer.train()
    optimizer = torch.optim.AdamW(own.delta_parameters().values(), lr=1e-2, weight_decay=0.0)
    (controller,) = own.controllers(StepPlan(12))
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    own.train()
    for step in range(1, 13):
        (own(**batch).loss + own.penalty()).backward()
        optimizer.step()
        controller.after_step(step)
        optimizer.zero_grad()
    controller.finish()
    assert ranks(trainers) == ranks(own) and sum(ranks(own).values()) == len(ranks(own))
    assert len(set(ranks(own).values())) > 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder, tuned = tmp_path_factory.mktemp("hf"), bert()
    trained(tuned, folder)
    return folder, state_of(tuned), ranks(tuned)


@pytest.mark.parametrize("step", [3, 4, 7, 8, 11])
def test_its_checkpoints_resume_the_same(whole, step):
    """Before the first decision, after it, before the removal, right after it, in the last part."""
    folder, expected, sizes = whole
    tuned = bert()
    watched = Watched(tuned)
    trained(tuned, folder, resume=step, save_strategy="no")
    assert ranks(tuned) == sizes and 0 in sizes.values()
    assert_same(state_of(tuned), expected)
    assert watched.controller.policy.target == len(sizes) and watched.controller.initial == 3 * len(sizes)


def test_the_best_delta_may_be_of_other_ranks(tmp_path):
    tuned, scores, seen = bert(), iter([1.0, 5.0, 2.0]), []

    def measure(prediction):
        seen.append(kept(tuned))
        return {"score": next(scores)}

    trainer = transformers.Trainer(
        model=tuned, args=arguments(tmp_path, **(OPTIONS | {
            "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5, "label_names": ["labels"], "load_best_model_at_end": True,
            "metric_for_best_model": "score", "greater_is_better": False})),
        train_dataset=ROWS, eval_dataset=ROWS[:4], compute_metrics=measure, callbacks=[trainer_callback(tuned)])
    trainer.train()
    assert ranks(tuned) == kept(tuned) == seen[0] != seen[1]
    assert sum(ranks(tuned).values()) > len(ranks(tuned))


def test_a_run_too_short_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="longer than the run"):
        trained(bert(every=6), tmp_path, max_steps=8)
    with pytest.raises(SettingsError, match="max_grad_norm"):
        trained(bert(), tmp_path, max_grad_norm=1.0)
