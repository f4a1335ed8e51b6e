"""Corrections of the quantisation error: optimal in their norm, towards the untouched model, stored in the layer."""

import pytest
import torch

from deltaloom.compact import QuantisedLinear
from deltaloom.compact.face import affine_weight
from deltaloom.compress._calibration import calibrated
from deltaloom.compress.base import weight_bytes
from deltaloom.compress.correct import Correct
from deltaloom.compress.gptq import GPTQ
from deltaloom.compress.magnitude import Magnitude
from deltaloom.compress.prune_neurons import PruneNeurons
from deltaloom.compress.quantise import Quantise
from deltaloom.compress.svd import SVD
from deltaloom.compress.wanda import Wanda
from deltaloom.compress.whitened_correct import WhitenedCorrect
from deltaloom.compress.whitened_svd import WhitenedSVD
from deltaloom.errors import RefusedError, SettingsError
from deltaloom.models.compact import record_forms
from tests.compress.pieces import LAYOUTS, batches, meta, outputs, shapes, work
from tests.toys import toy

BOTH = [Correct, WhitenedCorrect]


def corrected(layout, cls, rank=3, **options):
    done = work(layout)
    Quantise(codec="nf4").apply(done)
    quantised = {path: layer.dequantised() for path, layer in done.model.named_modules() if isinstance(layer, QuantisedLinear)}
    facts = cls(rank=rank, **options).apply(done)
    return done, facts, quantised


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cls", BOTH)
def test_sizes_are_the_sketchs_and_the_outputs_come_nearer(cls, layout):
    done, facts, quantised = corrected(layout, cls)
    sketch = meta(layout)
    Quantise(codec="nf4").sketch(sketch)
    assert weight_bytes(sketch) < weight_bytes(done.model)
    cls(rank=3).sketch(sketch)
    assert shapes(sketch) == shapes(done.model) and weight_bytes(sketch) == weight_bytes(done.model)
    assert set(quantised) == {record["layer"] for record in facts.layers}
    key = "weight_error" if cls is Correct else "output_error"
    assert all(record[key] < record[f"{key}_before"] for record in facts.layers)
    plain = work(layout)
    Quantise(codec="nf4").apply(plain)
    expected = outputs(toy(layout), layout)
    assert (outputs(done.model, layout) - expected).norm() < (outputs(plain.model, layout) - expected).norm()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plain_one_is_the_truncated_svd_of_the_error(layout):
    done, _, quantised = corrected(layout, Correct)
    original = toy(layout)
    for path, before in quantised.items():
        error = affine_weight(original.get_submodule(path)).detach().double() - before.double()
        u, s, vh = torch.linalg.svd(error, full_matrices=False)
        layer = done.model.get_submodule(path)
        torch.testing.assert_close((layer.left @ layer.right).double(), (u[:, :3] * s[:3]) @ vh[:3], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout", ["llama", "gpt2", "bert"])
def test_the_whitened_one_is_best_for_the_inputs_that_occur(layout):
    done, facts, quantised = corrected(layout, WhitenedCorrect, ridge=0)
    original, found = toy(layout), batches(layout)
    firsts = [site for site in SVD().sites(original) if site.role in ("q", "qkv")]
    reading = work(layout)
    reading.model = done.model
    for block in calibrated(done.model, found, firsts, gram=True):
        for path, inputs in block.items():
            values, vectors = torch.linalg.eigh(inputs.product())
            root = vectors * values.clamp(min=0).sqrt()
            weight = affine_weight(original.get_submodule(path)).detach().double()
            optimum = float(torch.linalg.svdvals((weight - quantised[path].double()) @ root)[3:].square().sum())
            change = weight - done.model.get_submodule(path).dequantised(torch.float64)
            assert float((change @ inputs.product() @ change.T).trace()) == pytest.approx(optimum, rel=1e-3)
    assert all(record["rank"] == 3 for record in facts.layers)


def test_it_goes_towards_the_untouched_model_whatever_came_between():
    done = work("llama")
    Wanda(sparsity=0.5).apply(done)
    GPTQ(group=8).apply(done)
    facts = Correct(rank=4).apply(done)
    original = toy("llama")
    for record in facts.layers:
        weight = affine_weight(original.get_submodule(record["layer"])).detach()
        change = weight - done.model.get_submodule(record["layer"]).dequantised()
        assert record["weight_error"] == pytest.approx(float(change.norm() / weight.norm()), rel=1e-3)


@pytest.mark.parametrize("cls", BOTH)
def test_what_it_does_not_fit_is_refused(cls):
    with pytest.raises(RefusedError, match="is not quantised") as caught:
        cls().sketch(meta("llama"))
    assert len(caught.value.problems) == 9
    done, _, _ = corrected("llama", cls)
    with pytest.raises(RefusedError, match="correction already"):
        cls().sketch(done.model)
    plain = work("llama")
    Quantise().apply(plain)
    with pytest.raises(RefusedError, match="no low rank"):
        cls(rank=8).sketch(plain.model)
    plain.original = None
    with pytest.raises(RefusedError, match="original"):
        cls(rank=2).apply(plain)
    with pytest.raises(SettingsError):
        cls(rank=0)
    pruned = work("llama")
    PruneNeurons(share=0.5).apply(pruned)
    Quantise().apply(pruned)
    with pytest.raises(RefusedError, match="other shapes"):
        cls(rank=2).apply(pruned)


STEPS = {
    "svd": [SVD(ratio=0.6)],
    "whitened": [WhitenedSVD(ratio=0.6, targets="mlp"), Quantise(codec="int8", targets="attention")],
    "corrected": [Quantise(codec="nf4"), WhitenedCorrect(rank=2)],
    "gptq": [Magnitude(sparsity="2:4"), GPTQ(group=8)],
    "pruned": [PruneNeurons(share=0.3), Quantise(codec="int4")],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("steps", STEPS)
def test_what_a_list_of_steps_makes_is_saved_and_read_back_bit_for_bit(steps, layout, tmp_path):
    done = work(layout)
    for step in STEPS[steps]:
        step.apply(done)
    expected = outputs(done.model, layout)
    record_forms(done.model)
    done.model.save_pretrained(tmp_path / "m")
    again = type(done.model).from_pretrained(tmp_path / "m").eval()
    assert torch.equal(outputs(again, layout), expected)
    assert shapes(again) == shapes(done.model)
