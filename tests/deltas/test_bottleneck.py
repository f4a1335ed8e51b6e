from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from deltaloom.deltas.bottleneck import ACTIVATIONS, Bottleneck
from deltaloom.errors import RefusedError, SettingsError, TargetError
from deltaloom.tuned import attach
from tests.contract.cases import perturb
from tests.toys import toy, toy_batch

# (layout, path of the layer that reads the mlp's input, path of the one that writes its output)
MLPS = [("bert", "bert.encoder.layer.{}.intermediate.dense", "bert.encoder.layer.{}.output.dense"),
        ("llama", "model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.down_proj"),
        ("gpt2", "transformer.h.{}.mlp.c_fc", "transformer.h.{}.mlp.c_proj")]


@pytest.mark.parametrize("layout,entry,leave", MLPS, ids=[row[0] for row in MLPS])
@pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
@pytest.mark.parametrize("scale", [4.0, "learned"])
def test_equals_hooks_by_hand(layout: str, entry: str, leave: str, placement: str, scale: float | str) -> None:
    tuned = attach(toy(layout), [Bottleneck(placement=placement, size=3, scale=scale, activation="gelu")])
    perturb(tuned, size=0.3)
    with torch.no_grad():
        got = tuned(**toy_batch(layout)).logits
    oracle, seen = toy(layout), {}

    def enter(block):
        return lambda module, args: seen.__setitem__(block, args[0])

    def exit_(block, delta):
        def hook(module, args, output):
            source = seen[block] if placement == "parallel" else output
            hidden = functional.gelu(source @ delta.down.T + delta.down_bias)
            return output + (hidden @ delta.up.T + delta.up_bias) * delta.scale
        return hook

    deltas = {site.layer: delta for site, delta in tuned.pairs()}
    assert sorted(deltas) == [0, 1]
    for block, delta in deltas.items():
        oracle.get_submodule(entry.format(block)).register_forward_pre_hook(enter(block))
        oracle.get_submodule(leave.format(block)).register_forward_hook(exit_(block, delta))
    with torch.no_grad():
        torch.testing.assert_close(got, oracle(**toy_batch(layout)).logits)


@pytest.mark.parametrize("layout,houlsby", [("bert", 4), ("llama", 4), ("gpt2", 4), ("t5", 10), ("bart", 10)])
def test_placements(layout: str, houlsby: int) -> None:
    mlps = 4 if layout in ("t5", "bart") else 2
    for placement, number in (("houlsby", houlsby), ("pfeiffer", mlps), ("parallel", mlps)):
        sites = Bottleneck(placement=placement).sites(toy(layout))
        assert len(sites) == number
    roles = {site.role for site in Bottleneck(placement="houlsby").sites(toy(layout))}
    assert roles == ({"attention", "cross_attention", "mlp"} if houlsby == 10 else {"attention", "mlp"})


def test_targets_overrule_the_placement() -> None:
    assert {site.role for site in Bottleneck(placement="parallel", targets="attention").sites(toy("t5"))} == {"attention"}
    assert len(Bottleneck(layers=(1,)).sites(toy("llama"))) == 1


def test_number_of_parameters() -> None:
    tuned = attach(toy("bert"), [Bottleneck(size=5)])
    assert tuned.counts() == (2 * (5 * 16 + 5 + 16 * 5 + 16), 0)


def test_refusals() -> None:
    with pytest.raises(SettingsError, match="placement"):
        Bottleneck(placement="nowhere")
    with pytest.raises(TargetError, match="cross_attention"):
        Bottleneck(targets="cross_attention").sites(toy("llama"))
    tuned = attach(toy("bert"), [Bottleneck()])
    with pytest.raises(RefusedError, match="merged"):
        tuned.merge()
    with pytest.raises(RefusedError, match="network"):
        tuned.pairs()[0][1].fold(torch.eye(16), None)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_is_legal(activation: str) -> None:
    Bottleneck(activation=activation)
    assert ACTIVATIONS[activation](torch.zeros(3)).eq(0).all()


def test_composes_with_a_change_of_the_same_layer() -> None:
    """The network adds to what the layer with the deltas before it gives, and takes the branch's input, not the layer's."""
    from deltaloom.deltas.lora import LoRA

    model = toy("bert")
    tuned = attach(model, [LoRA(rank=2, targets="down"), Bottleneck(placement="parallel", size=3)])
    perturb(tuned)
    path = "bert.encoder.layer.0.output.dense"
    lora, network = (next(delta for site, delta in pairs if site.path == path) for pairs in
                     ([p for p in tuned.pairs() if p[0].kind == "linear"], [p for p in tuned.pairs() if p[0].kind == "branch"]))
    seen = {}
    model.get_submodule(path).register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    model.get_submodule("bert.encoder.layer.0.intermediate.dense").register_forward_pre_hook(
        lambda m, args: seen.update(entry=args[0]))
    with torch.no_grad():
        tuned(**toy_batch("bert"))
        layer = model.get_submodule(path).base
        expected = network.after(seen["entry"], lora.after(seen["x"], layer(seen["x"])))
    torch.testing.assert_close(seen["y"], expected)
