"""Laws of the two compressors by factors: optimal in their norm, exact in size, and the whitened one better where it counts."""

import pytest
import torch

from deltaloom.compact import FactoredLinear
from deltaloom.compact.face import affine_weight
from deltaloom.compress._calibration import calibrated
from deltaloom.compress._lowrank import allocated, most_rank
from deltaloom.compress.base import weight_bytes
from deltaloom.compress.quantise import Quantise
from deltaloom.compress.svd import SVD
from deltaloom.compress.whitened_svd import WhitenedSVD
from deltaloom.errors import RefusedError, SettingsError, TargetError
from tests.compress.pieces import LAYOUTS, batches, compressed, outputs, shapes, sketched, work
from tests.toys import toy

BOTH = [SVD, WhitenedSVD]


def dense(model):
    """path -> weight (d_out, d_in), whatever form the layer has."""
    return {path: layer.dequantised() if isinstance(layer, FactoredLinear) else affine_weight(layer).detach()
            for path, layer in model.named_modules() if type(layer).__name__ in ("Linear", "Conv1D", "FactoredLinear")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cls", BOTH)
def test_sizes_are_those_of_the_sketch_and_within_the_budget(cls, layout):
    compressor = cls(ratio=0.7, ranks="uniform")
    done, facts = compressed(compressor, layout)
    assert weight_bytes(done.model) == weight_bytes(sketched(compressor, layout)) < weight_bytes(toy(layout))
    greedy = cls(ratio=0.7, ranks="greedy")
    loose = work(layout)
    greedy_facts = greedy.apply(loose)
    assert weight_bytes(loose.model) == weight_bytes(done.model)
    sites = compressor.sites(toy(layout))
    total = sum(site.d_in * site.d_out for site in sites)
    assert 0.6 * total < facts.figures["target_parameters_after"] <= 0.7 * total
    assert greedy_facts.figures["target_parameters_after"] == facts.figures["target_parameters_after"]
    assert outputs(done.model, layout).isfinite().all()
    for site in sites:
        layer = done.model.get_submodule(site.path)
        assert isinstance(layer, FactoredLinear) and layer.rank <= most_rank(site)
        assert (layer.bias is None) == (not site.has_bias)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plain_one_is_the_truncated_svd_of_each_weight(layout):
    done, facts = compressed(SVD(ratio=0.6, ranks="uniform"), layout)
    before, after = dense(toy(layout)), dense(done.model)
    for record in facts.layers:
        weight = before[record["layer"]].double()
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        rank = record["rank"]
        torch.testing.assert_close(after[record["layer"]].double(), (u[:, :rank] * s[:rank]) @ vh[:rank], rtol=1e-4, atol=1e-5)
        assert record["weight_error"] == pytest.approx(float(s[rank:].square().sum() / s.square().sum()) ** 0.5, rel=1e-5)
    untouched = set(before) - {record["layer"] for record in facts.layers}
    assert all(torch.equal(before[path], after[path]) for path in untouched)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_whitened_one_is_best_for_the_inputs_that_occur_and_each_block_sees_the_ones_before(layout):
    found = batches(layout)
    done = work(layout)
    facts = WhitenedSVD(ratio=0.6, ranks="uniform", ridge=0).apply(done)
    before, records = dense(toy(layout)), {record["layer"]: record for record in facts.layers}
    sites = WhitenedSVD().sites(toy(layout))
    # Blocks before are compressed and blocks behind do not matter: the inputs of a layer in the finished model are those at its
    # turn, except for those behind other layers of its own block. So the first layers of each block are checked.
    firsts = [site for site in sites if site.role in ("q", "qkv") and "EncDec" not in site.path]
    for block in calibrated(done.model, found, firsts, gram=True):
        for path, inputs in block.items():
            weight, gram, rank = before[path].double(), inputs.product(), records[path]["rank"]
            values, vectors = torch.linalg.eigh(gram)
            root = vectors * values.clamp(min=0).sqrt()
            optimum = float(torch.linalg.svdvals(weight @ root)[rank:].square().sum())
            change = weight - done.model.get_submodule(path).dequantised(torch.float64)
            got = float((change @ gram @ change.T).trace())
            total = float((weight @ gram @ weight.T).trace())
            assert got == pytest.approx(optimum, rel=1e-3, abs=1e-6 * total)
            assert records[path]["output_error"] == pytest.approx((got / total) ** 0.5, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_whitened_one_keeps_outputs_that_the_plain_one_loses(layout, ratio):
    errors = {}
    for cls in BOTH:
        done = work(layout)
        with torch.no_grad():  # inputs of very different size, as real ones are
            for site in SVD().sites(done.model):
                affine_weight(done.model.get_submodule(site.path)).mul_(torch.logspace(0, -2, site.d_in))
        original = dense(done.model)
        cls(ratio=ratio, ranks="uniform").apply(done)
        error = total = 0.0
        fresh = work(layout)
        for path, weight in original.items():
            if path in {site.path for site in SVD().sites(fresh.model)}:
                affine_weight(fresh.model.get_submodule(path)).data.copy_(weight)
        for block in calibrated(fresh.model, fresh.batches, SVD().sites(fresh.model), gram=True):
            for path, inputs in block.items():
                change = (original[path] - done.model.get_submodule(path).dequantised()).double()
                error += float((change @ inputs.product() @ change.T).trace())
                total += float((original[path].double() @ inputs.product() @ original[path].double().T).trace())
        errors[cls] = error / total
    assert errors[WhitenedSVD] < errors[SVD]


def test_greedy_ranks_go_where_a_direction_saves_most_and_sum_to_the_budget():
    flat, steep = torch.ones(8).double(), torch.logspace(0, -6, 8).double()
    assert allocated([flat, steep], [4, 4], most=6) == [6, 2]
    assert allocated([flat, flat], [4, 3], most=6) == [4, 3]
    assert allocated([steep, 1e9 * steep], [3, 3], most=6) == [3, 3]  # shares of a layer's own energy, not units
    assert sum(allocated([flat, steep, steep], [5, 5, 5], most=6)) == 15
    assert allocated([torch.zeros(8).double(), flat], [4, 4], most=6) == [2, 6]


def test_greedy_ranks_lose_less_energy_than_uniform_ones():
    uneven = work("llama")
    with torch.no_grad():
        uneven.model.model.layers[0].mlp.up_proj.weight.mul_(torch.logspace(0, -3, 24)[:, None])
    state = {name: tensor.clone() for name, tensor in uneven.model.state_dict().items()}
    shares = {}
    for ranks in ("greedy", "uniform"):
        again = work("llama")
        again.model.load_state_dict(state)
        facts = SVD(ratio=0.6, targets="up", ranks=ranks).apply(again)
        shares[ranks] = sum(record["weight_error"] ** 2 for record in facts.layers)
    assert shares["greedy"] < shares["uniform"]


def test_a_layer_used_twice_stays_one_layer():
    done = work("llama")
    done.model.model.layers[1] = done.model.model.layers[0]
    SVD(ratio=0.6).apply(done)
    first, second = done.model.model.layers
    assert first.self_attn.q_proj is second.self_attn.q_proj and isinstance(first.self_attn.q_proj, FactoredLinear)
    other = work("llama")
    other.model.model.layers[1].mlp.up_proj = other.model.model.layers[0].mlp.up_proj
    SVD(ratio=0.6).apply(other)
    assert other.model.model.layers[0].mlp.up_proj is other.model.model.layers[1].mlp.up_proj


def test_only_the_targets_change_and_bf16_stays_bf16():
    done = work("llama", dtype=torch.bfloat16)
    WhitenedSVD(ratio=0.7, targets="mlp", layers=(1,)).apply(done)
    changed = {path for path, layer in done.model.named_modules() if isinstance(layer, FactoredLinear)}
    assert changed == {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert {tensor.dtype for tensor in done.model.state_dict().values()} == {torch.bfloat16}


def test_tokens_that_never_occur_do_not_hurt():
    done = work("llama", count=1)
    done.batches = [done.batches[0].__class__({"input_ids": torch.full((1, 3), 7)}, None, (), torch.tensor([3]), 3)]
    facts = WhitenedSVD(ratio=0.6, ridge=0).apply(done)  # a Gram matrix of rank 3 at most
    assert all(record["output_error"] < 1e-3 for record in facts.layers if "layers.0" in record["layer"])
    assert outputs(done.model, "llama").isfinite().all()


@pytest.mark.parametrize("cls", BOTH)
def test_bad_input_is_refused_by_the_sketch_and_changes_nothing(cls):
    meta = toy("llama").to("meta")
    before = shapes(meta)
    with pytest.raises(RefusedError, match="no rank"):
        cls(ratio=0.05).sketch(meta)
    with pytest.raises(TargetError):
        cls(targets="nothing").sketch(meta)
    assert shapes(meta) == before
    with pytest.raises(SettingsError):
        cls(ratio=1.0)
    with pytest.raises(SettingsError):
        cls(targets="")
    assert Quantise.calibrates is False and WhitenedSVD.calibrates is True
    with pytest.raises(SettingsError, match="calibration rows"):
        empty = work("llama")
        empty.batches = []
        WhitenedSVD().apply(empty)
