"""Masks against written-out loops, counts to the entry."""

import pytest
import torch

from deltaloom.compact.face import affine_weight
from deltaloom.compress._calibration import calibrated
from deltaloom.compress._masks import kept
from deltaloom.compress.magnitude import Magnitude
from deltaloom.compress.svd import SVD
from deltaloom.compress.wanda import Wanda
from deltaloom.errors import RefusedError, SettingsError
from tests.compress.pieces import LAYOUTS, compressed, meta, work
from tests.toys import toy

SPARSITIES = [0.5, 0.3, "2:4", "4:8", "1:2"]


def weights(model):
    return {site.path: affine_weight(model.get_submodule(site.path)).detach().clone() for site in Wanda().sites(model)}


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_wanda_is_the_written_out_loop(layout, sparsity):
    done = work(layout)
    before, seen = weights(done.model), {}
    check = work(layout)
    Wanda(sparsity=sparsity).apply(done)
    after = weights(done.model)
    for block in calibrated(check.model, check.batches, Wanda().sites(check.model), gram=False):
        for path, inputs in block.items():
            weight = before[path]
            d_out, d_in = weight.shape
            expected = weight.clone()
            norms = [float(each) ** 0.5 for each in inputs.squares]
            for i in range(d_out):
                scores = [abs(float(weight[i, j])) * norms[j] for j in range(d_in)]
                if isinstance(sparsity, str):
                    n, m = (int(part) for part in sparsity.split(":"))
                    for start in range(0, d_in, m):
                        for j in sorted(range(start, start + m), key=scores.__getitem__)[:m - n]:
                            expected[i, j] = 0
                else:
                    for j in sorted(range(d_in), key=scores.__getitem__)[:int(sparsity * d_in)]:
                        expected[i, j] = 0
            assert torch.equal(after[path], expected), path
            seen[path] = 1
            affine_weight(check.model.get_submodule(path)).data.copy_(expected)
    assert set(seen) == set(before)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("cls", [Magnitude, Wanda])
def test_counts_are_exact_and_shapes_stay(cls, sparsity):
    done, facts = compressed(cls(sparsity=sparsity), "llama")
    for path, weight in weights(done.model).items():
        rows, d_in = weight.shape
        if isinstance(sparsity, str):
            n, m = (int(part) for part in sparsity.split(":"))
            assert ((weight.reshape(rows, -1, m) != 0).sum(2) == n).all(), path
        elif cls is Wanda:
            assert ((weight == 0).sum(1) == int(sparsity * d_in)).all(), path
        else:
            assert int((weight == 0).sum()) == int(sparsity * weight.numel()), path
    assert facts.notes and "large" in facts.notes[0]
    assert {record["layer"] for record in facts.layers} == set(weights(done.model))
    assert all(record["zeros"] == pytest.approx(float(sparsity) if not isinstance(sparsity, str) else 0.5, abs=0.05)
               for record in facts.layers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_magnitude_keeps_the_largest_of_the_matrix_as_they_were(layout):
    done, _ = compressed(Magnitude(sparsity=0.5), layout)
    for path, before in weights(toy(layout)).items():
        after = weights(done.model)[path]
        left = after != 0
        assert torch.equal(after[left], before[left])
        assert before[left].abs().min() >= before[~left].abs().max()


def test_ties_go_to_the_earlier_entry_and_nothing_is_lost_by_them():
    mask = kept(torch.ones(2, 8), 0.5)
    assert mask.tolist() == [[True] * 4 + [False] * 4] * 2
    assert kept(torch.ones(1, 8), "2:4").tolist() == [[True, True, False, False] * 2]
    assert kept(torch.zeros(1, 4), 0.2).all()


def test_inputs_decide_where_they_differ():
    done = work("llama")
    with torch.no_grad():
        done.model.model.layers[0].input_layernorm.weight[:] = 1e-4
        done.model.model.layers[0].input_layernorm.weight[:8] = 1.0
    before = done.model.model.layers[0].self_attn.q_proj.weight.clone()
    Wanda(sparsity=0.5, targets="q", layers=(0,)).apply(done)
    after = done.model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(after[:, :8], before[:, :8]) and not after[:, 8:].any()


def test_bad_input_is_refused():
    for wrong in (0.0, 1.0, -0.1, "4:4", "5:4", "2-4", "x", "2:99999"):
        with pytest.raises(SettingsError, match="sparsity"):
            Wanda(sparsity=wrong)
    with pytest.raises(RefusedError, match=r"16 columns|24 columns") as caught:
        Magnitude(sparsity="3:5").sketch(meta("llama"))
    assert len(caught.value.problems) == 8
    done = work("llama")
    SVD(ratio=0.6).apply(done)
    with pytest.raises(RefusedError, match="already"):
        Magnitude().sketch(done.model)
