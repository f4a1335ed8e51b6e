import pytest
import torch

from deltaloom.deltas.prefix import Prefix
from deltaloom.errors import CheckpointError
from deltaloom.private.back import Back
from deltaloom.private.cut import split
from deltaloom.private.front import FrontModel, Learner
from deltaloom.private.local import LocalChannel
from deltaloom.private.personal import attach_personal, take_common
from deltaloom.private.remote import RemoteBack
from deltaloom.train.loop import train
from deltaloom.tuned import attach
from tests.private.pieces import examples, feed_for, settings_for, task_for, three_blocks

COMMON, OWN = Prefix(length=3, init="random"), Prefix(length=2, init="random")


def test_a_personal_prefix_trains_behind_the_frozen_common_one():
    front, back = split(three_blocks("llama"), "causal-lm", 1)
    common = attach(front.model, [COMMON], seed=3).saved()
    front, back = split(three_blocks("llama"), "causal-lm", 1)
    tuned = attach_personal(front.model, common, [OWN], seed=5)
    before = {key: tensor.clone() for key, tensor in tuned.delta_state().items()}
    assert set(tuned.delta_parameters()) == {"1:model.layers.0.self_attn:keys", "1:model.layers.0.self_attn:values"}
    task, settings = task_for("llama", front.model), settings_for()
    remote = RemoteBack(LocalChannel(Back(back)), front)
    model = FrontModel(tuned, front, remote)
    untrained = task.predict_all(model, examples("llama"))
    train(tuned, Learner(task, model), feed_for(task, examples("llama"), settings), settings=settings, before_step=remote.begin)
    after = tuned.delta_state()
    assert {key.split(":")[0] for key in before if not torch.equal(before[key], after[key])} == {"1"}
    assert task.predict_all(model, examples("llama")) != untrained


def test_common_and_personal_tokens_are_one_prefix_in_that_order():
    front, _ = split(three_blocks("llama"), "causal-lm", 1)
    common = attach(front.model, [COMMON], seed=3).saved()
    front, _ = split(three_blocks("llama"), "causal-lm", 1)
    tuned = attach_personal(front.model, common, [OWN], seed=5)
    joined = {name: torch.cat([tuned.delta_state()[f"{part}:model.layers.0.self_attn:{name}"] for part in (0, 1)])
              for name in ("keys", "values")}
    other, _ = split(three_blocks("llama"), "causal-lm", 1)
    one = attach(other.model, [Prefix(length=5, init="random")])
    one.load_delta_state({f"0:model.layers.0.self_attn:{name}": tensor for name, tensor in joined.items()})
    ids = torch.tensor([[4, 5, 6, 7]])
    states = [each.model.base_model(input_ids=ids).last_hidden_state for each in (front, other)]
    assert torch.equal(states[0], states[1]) and one is not tuned


def test_a_new_common_part_leaves_the_personal_one():
    front, _ = split(three_blocks("llama"), "causal-lm", 1)
    first = attach(front.model, [COMMON], seed=3).saved()
    front, _ = split(three_blocks("llama"), "causal-lm", 1)
    tuned = attach_personal(front.model, first, [OWN])
    kept = {key: tensor.clone() for key, tensor in tuned.delta_state().items() if key.startswith("1:")}
    take_common(tuned, type(first)(first.methods, {key: tensor + 1 for key, tensor in first.state.items()}))
    assert all(torch.equal(kept[key], tensor) for key, tensor in tuned.delta_state().items() if key in kept) and kept
    assert all(torch.equal(tuned.delta_state()[key], tensor + 1) for key, tensor in first.state.items())
    with pytest.raises(CheckpointError, match="does not fit"):
        take_common(tuned, type(first)(first.methods, {}))
    front, _ = split(three_blocks("llama"), "causal-lm", 1)
    with pytest.raises(CheckpointError, match="does not fit"):
        attach_personal(front.model, type(first)(first.methods, {}), [OWN])
    attach(front.model, [OWN])  # the front was left as it was
