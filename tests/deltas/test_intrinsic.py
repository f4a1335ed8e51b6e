"""A method within a random subspace: equal to the method itself at theta0 + P z, trained by P^T g, and kept as z alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaloom.checkpoint import native
from deltaloom.deltas.base import method_from
from deltaloom.deltas.intrinsic import Intrinsic
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.train.settings import TrainSettings
from deltaloom.tuned import Tuned, attach
from tests.contract.cases import assert_same_tensors, logits, perturb, state, steps
from tests.toys import LAYOUTS, toy, toy_batch
from tests.train import pieces

LORA = {"method": "lora", "rank": 2}
OVERS: dict[str, dict[str, Any]] = {
    "lora": LORA, "dora": {"method": "dora", "rank": 2}, "full": {"method": "full"}, "norms": {"method": "norms"},
    "bitfit": {"method": "bitfit"}, "ia3": {"method": "ia3"}, "prefix": {"method": "prefix", "length": 3, "init": "random"},
    "network": {"method": "prefix", "length": 3, "reparametrise": 4}, "prompt": {"method": "prompt", "length": 3},
    "bottleneck": {"method": "bottleneck", "size": 4, "scale": "learned"},
    "embedded": {"method": "lora", "rank": 2, "targets": ["embed", "q"]}}


def subspace_of(tuned: Tuned):
    return tuned.attached()[0].attachment.shared["subspace"]


def theta(tuned: Tuned) -> torch.Tensor:
    """All tensors of the inner method as they are now."""
    subspace = subspace_of(tuned)
    subspace.refresh()
    return torch.cat([getattr(*places[0]).reshape(-1).float() for places in subspace.places])


def moved(layout: str, over: dict[str, Any], **settings: Any) -> Tuned:
    tuned = attach(toy(layout), [Intrinsic(over=over, **{"dimension": 20} | settings)])
    perturb(tuned)
    return tuned


@pytest.mark.parametrize("name", OVERS)
def test_it_is_the_method_itself_at_the_projected_values(name: str, layout: str = "llama") -> None:
    tuned = moved(layout, OVERS[name], scale=3.0)
    subspace, method = subspace_of(tuned), Intrinsic(over=OVERS[name]).inner()
    z = subspace.coordinates.detach()
    expected = torch.cat([start.reshape(-1) for start in subspace.starts]) + 3.0 * subspace.projection(z)
    torch.testing.assert_close(theta(tuned), expected, rtol=0, atol=0)
    assert list(tuned.delta_parameters()) == ["0:shared.subspace:coordinates"] and len(z) == 20
    other = attach(toy(layout), [method])
    parameters, start = other.delta_parameters(), 0
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(expected[start:start + parameter.numel()].view_as(parameter))
            start += parameter.numel()
    assert start == len(expected)
    torch.testing.assert_close(logits(tuned, layout), logits(other, layout), rtol=0, atol=0)
    for each in (tuned, other):
        each.train()
        each(**toy_batch(layout)).loss.backward()
        each.zero_grad() if each is tuned else None
        each(**toy_batch(layout)).loss.backward()  # twice: one expansion serves several backward passes
    gradient = torch.cat([p.grad.reshape(-1) / 2 for p in parameters.values()])
    torch.testing.assert_close(subspace.coordinates.grad, 3.0 * subspace.projection.transposed(gradient), rtol=1e-3, atol=1e-5)


def test_learned_scales_are_one_a_layer_and_get_their_gradient() -> None:
    tuned = moved("llama", LORA, scale="learned", dimension=40)
    subspace = subspace_of(tuned)
    layers = len(tuned.pairs())
    assert subspace.scales.shape == (layers,) and subspace.coordinates.shape == (40 - layers,)
    batch = toy_batch("llama")
    tuned(**batch).loss.backward()
    for index in (0, layers - 1):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                subspace.scales[index] += sign * 1e-2
                losses.append(tuned(**batch).loss.double())
                subspace.scales[index] -= sign * 1e-2
        assert subspace.scales.grad[index].item() == pytest.approx(((losses[0] - losses[1]) / 2e-2).item(), rel=0.03, abs=2e-4)


def test_the_file_holds_only_the_numbers_and_gives_the_same_delta(tmp_path: Path) -> None:
    for name in ("lora", "full", "prompt", "prefix"):
        tuned = moved("gpt2", OVERS[name])
        native.save(tuned, tmp_path / name)
        saved, record = native.read(tmp_path / name)
        assert {key: tuple(tensor.shape) for key, tensor in saved.state.items()} == {"0:shared.subspace:coordinates": (20,)}
        assert record.tensors.bytes < 300
        again = native.load(toy("gpt2"), tmp_path / name)
        assert torch.equal(theta(again), theta(tuned))
        assert torch.equal(logits(again, "gpt2"), logits(tuned, "gpt2"))


def test_the_runs_seed_does_not_matter_and_its_own_does() -> None:
    one, same = (attach(toy("llama"), [Intrinsic(over=LORA)], seed=seed) for seed in (0, 1))
    other = attach(toy("llama"), [Intrinsic(over=LORA, seed=1)])
    assert torch.equal(theta(one), theta(same))
    assert not torch.equal(theta(one), theta(other))
    torch.manual_seed(5)
    assert torch.equal(theta(attach(toy("llama"), [Intrinsic(over=LORA)])), theta(one))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["lora", "full", "ia3"])
def test_merging_is_expanding_and_the_methods_own_fold(layout: str, name: str) -> None:
    tuned = moved(layout, OVERS[name])
    answers = logits(tuned, layout)
    tuned.merge()
    torch.testing.assert_close(logits(tuned, layout), answers, rtol=1e-4, atol=1e-4)
    tuned.unmerge()
    assert torch.equal(logits(tuned, layout), answers)


def test_peft_gets_the_expanded_method() -> None:
    tuned = moved("llama", LORA)
    attached = tuned.attached()[0]
    with tuned.bare() as model:
        part = attached.method.to_peft(attached.attachment, model)
    down, _, _ = tuned.pairs()[0][1].factors()
    assert torch.equal(next(iter(part.tensors.values())), down.detach())


@pytest.mark.parametrize("layout", ["t5", "gpt2"])
def test_tied_layers_share_what_the_subspace_makes_and_count_as_run(layout: str) -> None:
    tuned = moved(layout, OVERS["full"])
    logits(tuned, layout)
    assert tuned.never_ran() == []
    sizes = sum(parameter.numel() for parameter in attach(toy(layout), [Intrinsic(over=OVERS["full"]).inner()]).delta_parameters()
                .values())
    assert sum(subspace_of(tuned).sizes) == sizes


def test_a_copy_is_a_copy() -> None:
    tuned = moved("llama", LORA)
    tuned.train()
    tuned(**toy_batch("llama")).loss.backward()
    twin = copy.deepcopy(tuned)
    steps(tuned, toy_batch("llama"), 1)
    assert not torch.equal(theta(tuned), theta(twin))
    perturb(twin)
    assert torch.equal(theta(twin), theta(copy.deepcopy(twin)))


def test_composes_with_itself_and_by_lanes() -> None:
    tuned = attach(toy("llama"), [Intrinsic(over=LORA, dimension=8), Intrinsic(over=OVERS["bitfit"], dimension=8)], "a")
    tuned.add("b", [Intrinsic(over=LORA, dimension=8, seed=3)])
    for lane in ("a", "b"):
        perturb(tuned, lane)
    answers = []
    for lane in ("a", "b"):
        with tuned.use(lane):
            answers.append(logits(tuned, "llama", rows=2))
    with tuned.use(["b", "a"]):
        mixed = logits(tuned, "llama", rows=2)
    torch.testing.assert_close(mixed, torch.stack((answers[1][0], answers[0][1])), rtol=1e-4, atol=1e-5)


def test_resumed_it_ends_the_same(tmp_path: Path) -> None:
    from deltaloom.train.checkpoints import read_checkpoint

    settings = TrainSettings(max_steps=6, batch_size=6, learning_rate=0.1, save_every=1, keep_checkpoints=9)
    made = [attach(pieces.small(), [Intrinsic(over={**LORA, "dropout": 0.2}, dimension=12, scale=s)]) for s in (1.0, 1.0)]
    pieces.run(made[0], settings, folder=tmp_path)
    pieces.run(made[1], settings, folder=tmp_path / "other", resume=read_checkpoint(tmp_path / "step-3"))
    assert_same_tensors(state(made[0]), state(made[1]))


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "adaptive": ({"over": {"method": "adalora", "rank": 1}}, RefusedError, "decides sizes or values"),
    "decomposed": ({"over": {"method": "lora", "rank": 2, "init": "pissa"}}, RefusedError, "computed"),
    "computed": ({"over": {"method": "prefix", "length": 2}}, RefusedError, "Choose another `init`"),
    "tokenizer": ({"over": {"method": "prompt", "init": "text", "text": "x", "length": 2}}, SettingsError, "tokenizer"),
    "dimension": ({"over": LORA, "dimension": 10 ** 6}, SettingsError, "no more parameters"),
    "scales": ({"over": LORA, "dimension": 5, "scale": "learned"}, SettingsError, "are scales"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_and_nothing_is_changed(name: str) -> None:
    settings, kind, text = REFUSED[name]
    model = toy("llama")
    before = logits(model, "llama")
    with pytest.raises(kind, match=text):
        attach(model, [Intrinsic(**settings)])
    assert torch.equal(logits(model, "llama"), before)


@pytest.mark.parametrize(("settings", "text"), [
    ({}, "over"), ({"over": {"method": "nothing"}}, "unknown method"), ({"over": {"method": "lora", "rank": 0}}, "rank"),
    ({"over": {"method": "intrinsic", "over": LORA}}, "subspace of a subspace"), ({"over": LORA, "scale": -1.0}, "above 0"),
    ({"over": LORA, "dimension": 0}, "dimension")])
def test_illegal_settings_are_errors(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        Intrinsic(**settings)


@pytest.mark.parametrize("over", [
    {"method": "prefix", "length": 3, "init": "random", "layers": "0"},
    {"method": "gated", "delta": {"method": "prefix", "length": 3, "init": "random", "layers": "0"}, "start": 0.25}])
def test_a_prefix_keeps_what_it_is_within_a_subspace(over: dict[str, Any]) -> None:
    """Who sees it, and its gate: at z = 0 it is the method itself, and the first token does not see it."""
    batch = toy_batch("llama", labels=False)
    tuned = attach(toy("llama"), [Intrinsic(over=over, dimension=20)])
    plain = attach(toy("llama"), [method_from(over, "over")])
    with torch.no_grad():
        for delta, other in zip((d for _, d in plain.pairs()), (d for _, d in tuned.pairs()), strict=True):
            keys, values = (one.detach().clone() for one in other.keys_values())
            assert (delta.spares_first, delta.gates) == (other.spares_first, other.gates)
            inner = delta.delta if delta.gates else delta
            inner.keys.copy_(keys)
            inner.values.copy_(values)
        torch.testing.assert_close(logits(tuned, batch), logits(plain, batch))
        perturb(tuned)
        with tuned.use(None):
            bare = logits(tuned, batch)
        torch.testing.assert_close(logits(tuned, batch)[:, 0], bare[:, 0])
