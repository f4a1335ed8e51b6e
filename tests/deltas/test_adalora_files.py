"""AdaLoRA in PEFT's files and in our own, with ranks that differ by layer, down to none."""

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaloom.checkpoint import native
from deltaloom.checkpoint.convert import put_back, to_lora
from deltaloom.checkpoint.peft import load_peft, write_peft
from deltaloom.deltas.adalora import AdaLoRA
from deltaloom.deltas.base import keep_rows
from deltaloom.errors import CheckpointError, RefusedError
from deltaloom.tuned import attach, restore
from tests.contract.cases import perturb
from tests.deltas.adaptive_pieces import Both, kept, ranks
from tests.toys import toy, toy_batch

MASKS = [[True, False, True], [False, False, False], [True, True, True], [False, True, False]]  # of q, v of two blocks
PATHS = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in ("q", "v")]


def ours(removed, layout="llama", targets=("q", "v")):
    """A delta as training leaves it, before or after masked components are removed."""
    tuned = attach(toy(layout), [AdaLoRA(rank=2, reserve=1.5, alpha=9, targets=targets)], seed=4)
    perturb(tuned, size=0.3)
    for (_, delta), mask in zip(tuned.pairs(), MASKS, strict=True):
        delta.triplets.mask.copy_(torch.tensor(mask))
        if removed:
            delta.triplets.keep(delta.triplets.mask.nonzero().squeeze(1), keep_rows)
    return tuned.eval()


@torch.no_grad()
def logits(model, layout="llama"):
    return model.eval()(**toy_batch(layout, labels=False)).logits


def peft_loaded(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, str(folder))


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize(("layout", "targets"), [("llama", ("q", "v")), ("gpt2", ("qkv", "down"))])
def test_a_delta_loads_in_peft_and_comes_back(removed, layout, targets, tmp_path):
    tuned = ours(removed, layout, targets)
    expected = logits(tuned, layout)
    assert (expected - logits(toy(layout), layout)).abs().max() > 0.01
    write_peft(tuned, tmp_path / "d", source="toy")
    torch.testing.assert_close(logits(peft_loaded(toy(layout), tmp_path / "d"), layout), expected, rtol=1e-5, atol=1e-5)
    back = load_peft(toy(layout), tmp_path / "d")
    torch.testing.assert_close(logits(back, layout), expected, rtol=1e-6, atol=1e-6)
    assert sorted(ranks(back).values()) == [0, 1, 2, 3] and kept(back) == ranks(back)
    method = back.attached()[0].method
    assert (method.initial_rank(), method.scale()) == (3, tuned.attached()[0].method.scale())
    write_peft(back, tmp_path / "again", source="toy")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("d", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("steps", [2, 10, 30])
def test_what_peft_saves_loads_here(steps, tmp_path):
    """Before the first decision, between two, and at the end."""
    both = Both()
    for step in range(1, steps + 1):
        both.peft.base_model(**toy_batch("bert", seed=step)).loss.backward()
        both.optimizers[1].step()
        both.peft.base_model.update_and_allocate(step)
        both.optimizers[1].zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes a layer of rank 0 for one that was not gathered
        both.peft.float().save_pretrained(str(tmp_path))
    tuned = load_peft(toy("bert"), tmp_path)
    again = logits(peft_loaded(toy("bert"), tmp_path), "bert")
    torch.testing.assert_close(logits(tuned, "bert"), again, rtol=1e-5, atol=1e-5)
    assert sum(ranks(tuned).values()) == (24 if steps == 2 else 12 if steps == 30 else sum(kept(tuned).values()))
    method = tuned.attached()[0].method
    assert (method.rank, method.reserve, method.alpha, method.beta1, method.beta2) == (2, 2, 7, 0.8, 0.9)


def test_training_goes_on_from_what_was_read(tmp_path):
    write_peft(ours(True), tmp_path / "d", source="toy")
    tuned = load_peft(toy("llama"), tmp_path / "d").train()
    (tuned(**toy_batch("llama")).loss + tuned.penalty()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuned.delta_parameters().values())


def test_parts_of_fused_layers_are_refused(tmp_path):
    tuned = attach(toy("gpt2"), [AdaLoRA(rank=2, targets=("q", "v"))])
    with pytest.raises(RefusedError, match="fused") as caught:
        write_peft(tuned, tmp_path / "d")
    assert "c_attn[q]" in str(caught.value) and not (tmp_path / "d").exists()


@pytest.fixture
def written(tmp_path):
    write_peft(ours(True), tmp_path / "d", source="toy")
    return tmp_path / "d"


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


FIRST = f"base_model.model.{PATHS[0]}"
DAMAGE = {
    "a missing part": (lambda t: t.pop(f"{FIRST}.lora_E"), "threes"),
    "a cut part": (lambda t: t.update({f"{FIRST}.lora_A": t[f"{FIRST}.lora_A"][:1]}), "lora_A, lora_E and lora_B are not"),
    "a flat part": (lambda t: t.update({f"{FIRST}.lora_E": t[f"{FIRST}.lora_E"][:, 0]}), "lora_A, lora_E and lora_B are not"),
    "another width": (lambda t: t.update({f"{FIRST}.lora_A": t[f"{FIRST}.lora_A"][:, :5].contiguous()}), "does not fit"),
    "a layer too many": (lambda t: t.update({f"base_model.model.other.{key}": torch.ones(1, 1)
                                             for key in ("lora_A", "lora_E", "lora_B")}), "in this model"),
    "a lost layer": (lambda t: [t.pop(f"{FIRST}.{key}") for key in ("lora_A", "lora_E", "lora_B")], "no tensors"),
    "no layer": (lambda t: t.clear(), "no lora_A"),
    "numbers that are none": (lambda t: t[f"{FIRST}.lora_A"].fill_(torch.nan), "finite|NaN"),
    "a stray tensor": (lambda t: t.update({f"{FIRST}.lora_magnitude": torch.ones(1)}), "does not explain"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused(kind, written):
    change, message = DAMAGE[kind]
    change_tensors(written, change)
    model = toy("llama")
    with pytest.raises((CheckpointError, RefusedError), match=message):
        load_peft(model, written)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("values", "message"), [
    ({"target_r": 0}, "target_r"), ({"init_r": "many"}, "init_r"), ({"target_r": None}, "target_r"), ({"beta1": 2}, "beta1"),
    ({"lora_alpha": -1}, "alpha"), ({"use_dora": True}, "use_dora"), ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"rank_pattern": {f"{PATHS[0]}.lora_E": [True, False, False]}}, "rank_pattern")])
def test_settings_that_cannot_be_meant_are_refused(values, message, written):
    change_config(written, **values)
    with pytest.raises(Exception, match=message) as caught:
        load_peft(toy("llama"), written)
    assert getattr(caught.value, "exit_code", None) == 2


def test_a_pattern_over_rows_that_are_still_there_masks_them(written):
    """PEFT removes them itself when it saves; others may not."""
    change_config(written, rank_pattern={f"{PATHS[0]}.lora_E": [True, False]})
    tuned = load_peft(toy("llama"), written)
    assert kept(tuned)[PATHS[0]] == 1 and ranks(tuned)[PATHS[0]] == 2


@pytest.mark.parametrize("removed", [False, True])
def test_a_plain_low_rank_delta_computes_the_same(removed):
    """Layers that kept nothing have no part in it."""
    tuned = ours(removed)
    expected = logits(tuned)
    converted = to_lora(tuned)
    assert converted.relative_error == 0
    if removed:
        assert [path for part in converted.saved.methods for path in part.sites] == [PATHS[0], PATHS[2], PATHS[3]]
    torch.testing.assert_close(logits(put_back(toy("llama"), converted)), expected, rtol=1e-6, atol=1e-6)
    cut = to_lora(ours(removed), rank=1)
    assert 0 < cut.relative_error < 1


def test_a_delta_of_nothing_at_all_converts_too():
    tuned = attach(toy("llama"), [AdaLoRA(rank=1, targets="q")])
    for _, delta in tuned.pairs():
        delta.triplets.keep(torch.zeros(0, dtype=torch.long), keep_rows)
    tuned.eval()
    converted = to_lora(tuned)
    assert converted.relative_error == 0
    assert torch.equal(logits(put_back(toy("llama"), converted)), logits(tuned))


# ---- our own files ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("removed", [False, True])
def test_our_own_file_keeps_ranks_and_masks(removed, tmp_path):
    tuned = ours(removed)
    native.save(tuned, tmp_path / "d", base={"source": "toy", "fingerprint": "f" * 64})
    saved, _ = native.read(tmp_path / "d")
    back = restore(toy("llama"), saved)
    torch.testing.assert_close(logits(back), logits(tuned), rtol=0, atol=0)
    assert ranks(back) == ranks(tuned) and list(kept(back).values()) == [2, 0, 3, 1]
    lane = restore(toy("llama"), saved)
    lane.add_saved("second", saved)
    assert ranks(lane) == ranks(tuned)


@pytest.mark.parametrize("key", ["up", "core", "down", "mask"])
def test_tensors_that_do_not_belong_together_are_no_delta(key):
    tuned, other = ours(True), ours(True)
    state = {name: tensor.clone() for name, tensor in tuned.delta_state().items()}
    name = f"0:{PATHS[2]}:triplets.{key}"
    state[name] = state[name][:1].clone()
    before = {name: tensor.clone() for name, tensor in other.delta_state().items()}
    with pytest.raises(CheckpointError, match=f"shape of {name}".replace("[", r"\[")):
        other.load_delta_state(state)
    after = other.delta_state()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_state_of_other_ranks_is_taken_back():
    small, large = ours(True), ours(False)
    expected = logits(large), logits(small)
    states = [{name: tensor.clone() for name, tensor in tuned.delta_state().items()} for tuned in (large, small)]
    small.load_delta_state(states[0])
    large.load_delta_state(states[1])
    assert torch.equal(logits(small), expected[0]) and torch.equal(logits(large), expected[1])
    assert set(ranks(small).values()) == {3} and list(ranks(large).values()) == [2, 0, 3, 1]
