import copy
from types import SimpleNamespace

import pytest
import torch

from deltaloom.deltas.lora import LoRA
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.private.bars import BarSettings, Comparison, Held, check_emulator, measure, on_front, tune_split
from deltaloom.private.cut import split
from deltaloom.tuned import attach
from tests.private.pieces import PREFIX, examples, head_of, is_causal, settings_for, task_for, task_name, three_blocks

NAMES = ["base", "emulator", "emulator_tuned", "plugged_in", "split_tuned", "own:a", "own:b", "central_front", "central_all"]


def emulator_of(layout, model):
    """The model with its second block's weights halved."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".1." in name and parameter.ndim > 1:
                parameter.mul_(0.5)
    return made


def comparison(layout, model, parties, rounds=1, **more):
    task = task_for(layout, model)
    held = examples(layout, 12, seed=1)
    rows = [SimpleNamespace(target=("a", "b", "c")[index % 3]) for index in range(12)]
    steps = settings_for(max_steps=4, learning_rate=0.01)
    central = settings_for(max_steps=4 * rounds, learning_rate=0.01)
    head, labels = ("owner", "owner") if is_causal(layout) else ("party", "home")
    settings = BarSettings(cut=1, head=head, labels=labels, rounds=rounds, emulate=steps, tune=steps, central=central)
    return Comparison(task, parties, {"all": Held(held, rows)}, [PREFIX], settings, head_of(layout, model), say=lambda line: None,
                      **more)


@pytest.mark.parametrize("layout", ["llama", "bert"])
def test_all_bars_are_measured_and_the_models_stay_as_they_are(layout):
    model = three_blocks(layout)
    emulator = emulator_of(layout, model)
    before = [{name: tensor.clone() for name, tensor in each.state_dict().items()} for each in (model, emulator)]
    parties = {"a": examples(layout, 12, seed=1), "b": examples(layout, 6, seed=2)}
    found = measure(model, emulator, comparison(layout, model, parties, rounds=2))
    assert list(found.bars) == NAMES
    losses = {name: scores["all"]["loss"] for name, scores in found.bars.items()}
    assert losses["emulator_tuned"] < losses["emulator"] and losses["split_tuned"] < losses["plugged_in"]
    assert found.parties == {"a": {"rows": 12, "samples": 48, "steps": 8}, "b": {"rows": 6, "samples": 48, "steps": 8}}
    for each, state in zip((model, emulator), before, strict=True):
        assert each.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in each.state_dict().items())


@pytest.mark.parametrize("layout", ["llama", "bert"])
def test_one_party_alone_tunes_what_central_tuning_tunes(layout):
    model = three_blocks(layout)
    found = measure(model, emulator_of(layout, model), comparison(layout, model, {"a": examples(layout, 12, seed=1)}))
    assert found.bars["split_tuned"] == found.bars["central_front"] == found.bars["own:a"]
    assert found.bars["split_tuned"] != found.bars["central_all"]


@pytest.mark.parametrize("layout", ["llama", "bert"])
def test_a_round_of_two_parties_is_the_written_out_mean(layout):
    model = three_blocks(layout)
    made = comparison(layout, model, {"a": examples(layout, 12, seed=1), "b": examples(layout, 4, seed=2)})
    front, back = split(model, task_name(layout), 1, head=made.settings.head)
    tuned = attach(front.model, [on_front(PREFIX, front)], heads=made.heads, seed=3)
    start = tuned.saved()
    tuned.detach()
    ends = [tune_split(front, back, start, made, names, lambda name, scores: None, "bar") for names in (["a"], ["b"], ["a", "b"])]
    (a, _), (b, _), (both, facts) = ends
    assert (facts["a"]["samples"], facts["b"]["samples"]) == (24, 16)
    for key, tensor in both.state.items():
        mean = (24 * a.state[key].double() + 16 * b.state[key].double()) / 40
        assert torch.equal(tensor, mean.to(tensor.dtype))


def test_another_emulator_is_refused():
    model = three_blocks("llama")
    other = three_blocks("llama", seed=1)
    with pytest.raises(RefusedError, match="other values"):
        check_emulator(model, other, 1)
    check_emulator(model, emulator_of("llama", model), 1)
    with pytest.raises(RefusedError, match="must be at the party"):
        made = comparison("bert", three_blocks("bert"), {})
        measure(model, other, type(made)(**{**vars(made), "settings": BarSettings(**{**made.settings.given(), "head": "owner"})}))
    with pytest.raises(SettingsError, match="needs labels: home"):
        BarSettings(**{**made.settings.given(), "labels": "owner"})


@pytest.mark.parametrize("layout", ["llama", "gpt2", "phi3", "bert"])
def test_methods_are_kept_to_the_front(layout):
    model = three_blocks(layout)
    front, _ = split(model, task_name(layout), 1)
    for method in (PREFIX, LoRA(rank=2, targets=("q", "v"))):
        sites = [site.name for site, _ in attach(model, [on_front(method, front)]).pairs()]
        whole = [site.name for site, _ in attach(three_blocks(layout), [method]).pairs()]
        assert sites == whole[:len(whole) // 2]
        model = three_blocks(layout)
