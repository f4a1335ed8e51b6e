from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltaloom.attention import Segments
from deltaloom.checkpoint import native
from deltaloom.deltas._layout import BatchLayout, Places
from deltaloom.deltas.base import StepPlan, method_from, method_record
from deltaloom.deltas.gated import Gated, GatedDelta, GatedPrefix
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.tuned import Tuned, attach
from deltaloom.tuned.adapted import Adapted
from tests.contract.cases import gradients, perturb, state
from tests.toys import toy, toy_batch

LORA = {"method": "lora", "rank": 2, "targets": ["q", "v"]}
PREFIX = {"method": "prefix", "length": 3}
BOTTLENECK = {"method": "bottleneck", "size": 3, "placement": "parallel"}
ALL = [LORA, PREFIX, BOTTLENECK]
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]])


def gated(layout: str, records=ALL, start: float = 0.3, size: float = 0.3) -> Tuned:
    """Every method behind gates that depend on their input."""
    tuned = attach(toy(layout), [Gated(delta=record, start=start) for record in records])
    perturb(tuned, size=size)
    return tuned


def inputs(layout: str, **others: Tensor) -> dict[str, Tensor]:
    batch = toy_batch(layout, labels=False) | others
    return batch | ({"decoder_input_ids": toy_batch(layout, time=4, seed=2)["labels"]} if layout == "t5" else {})


def answers(tuned: Tuned, layout: str, **others: Tensor) -> Tensor:
    with torch.no_grad():
        return tuned(**inputs(layout, **others)).logits


@pytest.mark.parametrize("layout", ["llama", "bert"])
def test_a_gated_change_is_the_loop_over_tokens(layout: str) -> None:
    tuned = gated(layout, [LORA])
    wrapper = next(module for module in tuned.model.modules() if isinstance(module, Adapted))
    ((_, delta),) = wrapper.items("default")
    seen: dict[str, Tensor] = {}
    wrapper.base.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    wrapper.register_forward_hook(lambda module, args, output: seen.update(out=output))
    answers(tuned, layout, attention_mask=MASK)
    assert isinstance(delta, GatedDelta)
    down, scale, up = (factor.detach().double() for factor in delta.delta.factors())
    for row in range(3):
        x, y = seen["x"][row].double(), seen["y"][row].double()
        gates = [1 / (1 + torch.exp(-(delta.gate.weight.double() @ x[t] + delta.gate.bias))) for t in range(7)]
        if layout == "bert":
            real = [gates[t] for t in range(7) if MASK[row, t]]
            gates = [sum(real) / len(real)] * 7
        for t in range(7):
            want = y[t] + gates[t] * ((up * scale) @ (down @ x[t]))
            torch.testing.assert_close(seen["out"][row, t].double(), want, atol=1e-6, rtol=1e-5)


def test_the_mean_over_rows_is_the_loop_and_stays_finite() -> None:
    layout, logs = BatchLayout(), torch.randn(3, 7, dtype=torch.float64) * 3
    layout.watch("m")
    for mask in (None, MASK.bool(), torch.zeros(3, 7, dtype=torch.bool)):
        layout.places["m"] = Places(mask)
        real = [[logs[row, t].exp() for t in range(7) if mask is None or mask[row, t] or not mask.any()] for row in range(3)]
        want = torch.stack([sum(row) / len(row) for row in real]).log()[:, None]
        torch.testing.assert_close(layout.log_mean("m", logs), want)
    layout.places["m"] = Places(None, (2, 5))
    want = torch.stack([logs[0, :2].exp().mean().log(), logs[0, 2:].exp().mean().log()])[:, None]
    torch.testing.assert_close(layout.log_mean("m", logs[:1]), want)
    assert torch.equal(layout.spread("m", want)[0], want[[0, 0, 1, 1, 1, 1, 1], 0])
    layout.places["m"] = Places(MASK.bool())
    with layout.narrowed(torch.tensor([2])):
        torch.testing.assert_close(layout.log_mean("m", logs[2:]), logs[2:, :2].exp().mean(1, keepdim=True).log())
    with pytest.raises(RefusedError, match="other rows"):
        layout.log_mean("m", logs[:2])
    far = torch.full((1, 7), -1e4, requires_grad=True)
    layout.places["m"] = Places(torch.arange(7)[None] < 3)
    layout.log_mean("m", far).sum().backward()
    assert far.grad is not None
    torch.testing.assert_close(far.grad, torch.tensor([[1 / 3] * 3 + [0.0] * 4]))


@pytest.mark.parametrize("layout", ["bert", "t5", "llama"])
def test_padding_changes_nothing(layout: str) -> None:
    tuned = gated(layout)
    padded = answers(tuned, layout, attention_mask=MASK)
    for row, length in enumerate((7, 4, 2)):
        alone = {key: value[row:row + 1] for key, value in inputs(layout).items()}
        alone["input_ids"] = alone["input_ids"][:, :length]
        with torch.no_grad():
            want = tuned(**alone, attention_mask=MASK[row:row + 1, :length]).logits[0]
        torch.testing.assert_close(padded[row][:len(want)] if layout == "llama" else padded[row], want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["llama", "t5"])
def test_generated_rows_of_a_padded_batch_are_those_of_rows_alone(layout: str) -> None:
    """In encoder-decoders it is the encoder that `generate` calls with the mask, not the model."""
    tuned, ids = gated(layout), toy_batch(layout, labels=False)["input_ids"]
    mask = MASK.flip(1) if layout == "llama" else MASK  # a causal model goes on from the last place
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = tuned.model.generate(ids, attention_mask=mask, **settings)
    for row in range(3):
        kept = ids[row:row + 1, mask[row].bool()]
        alone = tuned.model.generate(kept, attention_mask=torch.ones_like(kept), **settings)
        assert torch.equal(made[row, -5:], alone[0, -5:])


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_no_token_sees_those_behind_it(layout: str) -> None:
    tuned = gated(layout)
    batch = inputs(layout)["input_ids"]
    other = batch.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 60 + 3
    torch.testing.assert_close(answers(tuned, layout, input_ids=batch)[:, :4], answers(tuned, layout, input_ids=other)[:, :4])


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("record", [*ALL, {"method": "ia3", "targets": ["down"]}], ids=lambda record: record["method"])
def test_a_shut_gate_is_the_bare_model(layout: str, record: dict) -> None:
    tuned = gated(layout, [record])
    moved = answers(tuned, layout, attention_mask=MASK)
    with torch.no_grad():
        for _, delta in tuned.pairs():
            delta.gate.weight.zero_()
            delta.gate.bias.fill_(-1e4)
    shut = answers(tuned, layout, attention_mask=MASK)
    with tuned.use(None):
        bare = answers(tuned, layout, attention_mask=MASK)
    assert not torch.allclose(moved, bare, atol=1e-4)
    if record is PREFIX:  # the weights of its keys are zero; the sum over more keys rounds otherwise
        torch.testing.assert_close(shut, bare)
    else:
        assert torch.equal(shut, bare)


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert"])
def test_packed_rows_equal_rows_apart(layout: str) -> None:
    tuned, lengths = gated(layout), (7, 4, 2)
    ids = toy_batch(layout, labels=False)["input_ids"]
    packed = Segments(lengths)
    row = torch.cat([ids[index, :length] for index, length in enumerate(lengths)])[None]
    with torch.no_grad():
        together = tuned.model.base_model(input_ids=row, position_ids=packed.positions(), segments=packed).last_hidden_state[0]
        for index, part in enumerate(together.split(lengths)):
            alone = tuned.model.base_model(input_ids=ids[index:index + 1, :lengths[index]]).last_hidden_state[0]
            torch.testing.assert_close(part, alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["bert", "t5"])
def test_recomputing_sees_the_mask_of_its_own_call(layout: str) -> None:
    found = []
    for checkpointing in (False, True):
        tuned = gated(layout)
        if checkpointing:
            tuned.checkpoint_activations()
        tuned.train()
        loss = tuned(**toy_batch(layout), attention_mask=MASK, **({} if layout == "bert" else {"use_cache": False})).loss
        if checkpointing:
            answers(tuned, layout, attention_mask=MASK.flip(0))
        loss.backward()
        found.append(gradients(tuned))
    for key, expected in found[0].items():
        torch.testing.assert_close(found[1][key], expected)


def test_rows_of_two_lanes_and_of_none() -> None:
    tuned = gated("bert")
    tuned.add("b", [Gated(delta=PREFIX | {"length": 2}), method_from(PREFIX)], seed=3)
    perturb(tuned, "b", seed=4)
    lanes = ["b", None, "default"]
    with tuned.use(lanes):
        mixed = answers(tuned, "bert", attention_mask=MASK)
    for row, lane in enumerate(lanes):
        with tuned.use(lane):
            torch.testing.assert_close(mixed[row], answers(tuned, "bert", attention_mask=MASK)[row], atol=1e-5, rtol=1e-4)
    tuned.remove("default")
    with tuned.use("b"):
        assert answers(tuned, "bert").isfinite().all()
    bare = tuned.detach()
    assert not any(isinstance(module, Adapted) or module._forward_pre_hooks for module in bare.modules())


def test_adaptive_ranks_behind_gates_are_saved_and_loaded(tmp_path: Path) -> None:
    method = Gated(delta={"method": "adalora", "rank": 1, "reserve": 2, "targets": ["q", "v"], "every": 1})
    tuned = attach(toy("llama"), [method])
    batch = toy_batch("llama")
    (controller,) = tuned.controllers(StepPlan(10))
    for step in range(1, 11):
        (tuned(**batch).loss + tuned.penalty()).backward()
        controller.after_backward(step)
        with torch.no_grad():
            for parameter in tuned.delta_parameters().values():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
        controller.after_step(step)
    controller.finish()
    assert sum(len(value) for key, value in state(tuned).items() if key.endswith("core")) == 4
    native.save(tuned, tmp_path / "delta")
    again = native.load(toy("llama"), tmp_path / "delta")
    assert again.attached()[0].method == method
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, tuned(**batch).logits)


def test_birth_value_and_record() -> None:
    method = Gated(delta=LORA, start=0.8)
    tuned = attach(toy("bert"), [method, Gated(delta=PREFIX)])
    kinds = {type(delta) for _, delta in tuned.pairs()}
    assert kinds == {GatedDelta, GatedPrefix}
    delta = tuned.pairs()[0][1]
    assert isinstance(delta, GatedDelta)
    torch.testing.assert_close(delta.gate.factor(torch.randn(2, 16)), torch.full((2, 1), 0.8))
    assert method_from(method_record(method)) == method
    some = Gated(delta=LORA | {"layers": "1"})
    assert some.layers == "1" and {site.layer for site in some.sites(toy("bert"))} == {1}
    assert {site.role for site in Gated(delta=LORA, targets="down").sites(toy("bert"))} == {"down"}
    assert method.as_dict()["delta"]["alpha"] == method_from(LORA).as_dict()["alpha"], "the resolved record has every setting"


@pytest.mark.parametrize("record,layout,match", [
    ({"method": "full", "targets": "classifier"}, "bert", "own tensors"),
    ({"method": "norms"}, "llama", "own tensors"),
    ({"method": "prompt", "length": 2}, "llama", "in front of the embeddings")])
def test_what_has_nothing_to_scale_is_refused(record: dict, layout: str, match: str) -> None:
    model = toy(layout)
    with pytest.raises(RefusedError, match="cannot be gated") as caught:
        attach(model, [Gated(delta=record)])
    assert match in str(caught.value)
    assert not any(isinstance(module, Adapted) for module in model.modules())


def test_bad_settings_and_merging_are_refused() -> None:
    for bad in ({"method": "gated", "delta": LORA}, {"method": "lorra"}, {"method": "lora", "rang": 2}, {}):
        with pytest.raises(SettingsError):
            Gated(delta=bad)
    with pytest.raises(SettingsError):
        Gated(delta=LORA, start=1.0)
    tuned = gated("llama", [LORA])
    with pytest.raises(RefusedError, match="depends on the input"):
        tuned.merge()
    with pytest.raises(RefusedError, match="cannot be merged"):
        gated("llama", [PREFIX]).merge()


def test_a_mask_that_says_nothing_of_tokens_is_refused() -> None:
    tuned = gated("bert", [LORA])
    with pytest.raises(RefusedError, match=r"\(batch, time\)"):
        answers(tuned, "bert", attention_mask=torch.ones(3, 1, 7, 7))


def test_behind_a_gate_a_prefix_still_spares_the_first_token() -> None:
    tuned = attach(toy("llama"), [Gated(delta={"method": "prefix", "length": 3, "layers": "0"})])
    perturb(tuned)
    ids = toy_batch("llama", labels=False)["input_ids"]
    with torch.no_grad(), tuned.use(None):
        plain = tuned(input_ids=ids).logits
    with torch.no_grad():
        found = tuned(input_ids=ids).logits
    torch.testing.assert_close(found[:, 0], plain[:, 0])
    assert not torch.allclose(found[:, 1:], plain[:, 1:], atol=1e-5)
