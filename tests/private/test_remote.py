"""Split equals unsplit, bit for bit: losses, trained deltas, predictions; with one party and no batching across parties."""

import pytest
import torch

from deltaloom.deltas.bottleneck import Bottleneck
from deltaloom.deltas.lora import LoRA
from deltaloom.deltas.prefix import Prefix
from tests.private.pieces import CAUSAL, CLASSES, examples, is_causal, run_split, run_whole, settings_for, task_for, three_blocks

FIRST = {"llama": "model.layers.0.*", "qwen3": "model.layers.0.*", "gemma": "model.layers.0.*", "phi": "model.layers.0.*",
         "phi3": "model.layers.0.*", "gpt2": "transformer.h.0.*", "bert": "bert.encoder.layer.0.*",
         "roberta": "roberta.encoder.layer.0.*", "distilbert": "distilbert.transformer.layer.0.*",
         "llama-classifier": "model.layers.0.*"}


def prefix(layout):
    return [Prefix(length=3, init="random", targets=FIRST[layout])]


def assert_same(whole, split, layout):
    assert split.losses == whole.losses
    assert split.state.keys() == whole.state.keys()
    assert [key for key in whole.state if not torch.equal(whole.state[key], split.state[key])] == []
    rows = examples(layout, 7, seed=5)
    task = task_for(layout, whole.tuned.model)
    assert task.predict_all(split.model, rows) == task.predict_all(whole.model, rows)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("layout", CAUSAL)
def test_a_language_model_with_its_loss_at_the_owner(layout, packing):
    settings = settings_for(packing)
    whole = run_whole(layout, three_blocks(layout), prefix(layout), settings, heads=False)
    split = run_split(layout, three_blocks(layout), prefix(layout), settings, labels="owner", head="owner")
    assert_same(whole, split, layout)


@pytest.mark.parametrize("layout", CAUSAL)
def test_a_language_model_with_labels_and_head_at_home(layout):
    settings = settings_for()
    whole = run_whole(layout, three_blocks(layout), prefix(layout), settings, heads=False)
    split = run_split(layout, three_blocks(layout), prefix(layout), settings, labels="home", head="party")
    assert_same(whole, split, layout)


@pytest.mark.parametrize("layout", CLASSES)
@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 2.0)], ids=["plain", "weighted"])
def test_a_classifier_with_labels_and_head_at_home(layout, weights):
    settings = settings_for()
    whole = run_whole(layout, three_blocks(layout), prefix(layout), settings, heads=True, weights=weights)
    split = run_split(layout, three_blocks(layout), prefix(layout), settings, labels="home", head="party", weights=weights)
    assert len(whole.state) > 2  # the head trains too
    assert_same(whole, split, layout)


@pytest.mark.parametrize("layout", CLASSES)
def test_a_classifier_whose_trained_head_is_at_the_owner(layout):
    settings = settings_for()
    whole = run_whole(layout, three_blocks(layout), prefix(layout), settings, heads=False)
    split = run_split(layout, three_blocks(layout), prefix(layout), settings, labels="owner", head="owner")
    assert_same(whole, split, layout)


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("method", [LoRA(rank=2), Bottleneck(size=4)], ids=["lora", "bottleneck"])
def test_other_deltas_on_the_front(layout, method):
    method = type(method)(**{**method.given(), "targets": (FIRST[layout],)})
    home = not is_causal(layout)
    settings = settings_for()
    whole = run_whole(layout, three_blocks(layout), [method], settings, heads=home)
    split = run_split(layout, three_blocks(layout), [method], settings, labels="home" if home else "owner",
                      head="party" if home else "owner")
    assert_same(whole, split, layout)


@pytest.mark.parametrize("labels", ["owner", "home"])
@pytest.mark.parametrize("layout", ["llama", "bert"])
def test_a_window_of_micro_batches_changes_nothing(layout, labels):
    settings = settings_for()
    head = "owner" if labels == "owner" else "party"
    one, four = (run_split(layout, three_blocks(layout), prefix(layout), settings, labels=labels, head=head, window=window)
                 for window in (1, 4))
    assert one.losses == four.losses
    assert [key for key in one.state if not torch.equal(one.state[key], four.state[key])] == []


def test_logits_that_come_home_train_like_losses_at_the_owner_up_to_rounding():
    settings = settings_for()
    owner = run_split("llama", three_blocks("llama"), prefix("llama"), settings, labels="owner", head="owner")
    home = run_split("llama", three_blocks("llama"), prefix("llama"), settings, labels="home", head="owner")
    for key in owner.state:
        torch.testing.assert_close(owner.state[key], home.state[key], rtol=1e-4, atol=1e-4)
    assert home.losses == pytest.approx(owner.losses, rel=1e-5)
