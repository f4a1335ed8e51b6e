import pytest
import torch

from deltaloom.deltas.fact_tk import FacTTK
from deltaloom.tuned import attach
from tests.deltas.dense_changes import MODELS, assert_is, block, changed, square_bert
from tests.toys import toy


def matrix(scale, edge):
    """The dumb way: each slice's core as a sum over the last index of C, then the slice, put where it belongs."""
    def build(site, state):
        total = torch.zeros(site.d_out, site.d_in, dtype=torch.float64)
        name = f"square-{edge}" if site.d_out % edge == site.d_in % edge == 0 else f"{site.d_out}x{site.d_in}"
        up, down, shared = (state[f"shared.{name}:{key}"] for key in ("up", "down", "core"))
        places = [(i, j) for i in range(0, site.d_out, len(up)) for j in range(0, site.d_in, down.shape[1])]
        for (i, j), weights in zip(places, state[f"{site.name}:weights"], strict=True):
            core = torch.zeros(shared.shape[:2], dtype=torch.float64)
            for k, weight in enumerate(weights):
                core += weight * shared[:, :, k]
            total[i:i + len(up), j:j + down.shape[1]] = scale * block(up, core, down)
        return total
    return build


@pytest.mark.parametrize("targets", ["all-linear", ("q", "k", "v"), "up", "down"])
@pytest.mark.parametrize("name", MODELS)
def test_every_slice_is_its_mixture_of_the_shared_core(name, targets):
    plain, tuned = changed(name, FacTTK(rank=3, scale=0.75, targets=targets))
    assert_is(tuned, plain, name.removeprefix("square-"), matrix(0.75, 16))


def test_a_slice_costs_one_row_as_in_the_paper():
    tuned = attach(square_bert(), [FacTTK(rank=5)])
    assert list(tuned.attached()[0].attachment.shared) == ["square-16"]
    assert tuned.counts()[0] == 5 * (16 + 16) + 5 ** 3 + 24 * 5


def test_other_shapes_have_bases_of_their_own():
    tuned = attach(toy("llama"), [FacTTK(rank=4)])  # k and v are 8 x 16, the mlp 24 wide
    shared = tuned.attached()[0].attachment.shared
    assert list(shared) == ["square-16", "8x16", "24x16", "16x24"]
    assert tuned.counts()[0] == 4 * (32 + 24 + 40 + 40) + 4 * 4 ** 3 + (4 + 4 + 4 + 2) * 4


@pytest.mark.parametrize(("targets", "count"), [("re:.*layer.1.*query", 1), ("re:.*layer.1.*intermediate.dense", 4),
                                                ("re:.*layer.1.output.dense", 4)])
def test_one_layer_alone(targets, count):
    plain, tuned = changed("square-bert", FacTTK(rank=3, targets=targets))
    assert tuned.counts()[0] == 3 * 32 + 27 + count * 3
    assert_is(tuned, plain, "bert", matrix(1.0, 16))


def test_initial_values_are_those_of_the_authors_code():
    tuned = attach(square_bert(), [FacTTK(rank=8)])
    bases = tuned.attached()[0].attachment.shared["square-16"]
    assert not bases.up.any()
    weights = torch.cat([delta.weights for _, delta in tuned.pairs()])
    torch.manual_seed(0)
    xavier = torch.nn.init.xavier_uniform_  # of a tensor (r, r, r), and of P as the authors have it, (r, N)
    for tensor, bound in ((bases.down, 0.25), (bases.core, xavier(torch.empty(8, 8, 8)).abs().max()),
                          (weights, xavier(torch.empty(8, 24)).abs().max())):
        values, bound = tensor.detach(), float(bound)
        assert float(values.abs().max()) == pytest.approx(bound, rel=0.05)
        assert float(values.std()) == pytest.approx(bound / 3 ** 0.5, rel=0.15)
