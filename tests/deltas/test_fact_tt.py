import pytest
import torch

from deltaloom.deltas.fact_tt import FacTTT
from deltaloom.tuned import attach
from tests.deltas.dense_changes import MODELS, assert_is, block, changed, square_bert
from tests.toys import toy


def matrix(scale, edge):
    """The dumb way: each slice of a matrix on its own, put where it belongs."""
    def build(site, state):
        total = torch.zeros(site.d_out, site.d_in, dtype=torch.float64)
        name = f"square-{edge}" if site.d_out % edge == site.d_in % edge == 0 else f"{site.d_out}x{site.d_in}"
        up, down = state[f"shared.{name}:up"], state[f"shared.{name}:down"]
        step_out, step_in, index = len(up), down.shape[1], 0
        for i in range(0, site.d_out, step_out):
            for j in range(0, site.d_in, step_in):
                core = state[f"{site.name}:core"][index]
                total[i:i + step_out, j:j + step_in] = scale * block(up, core, down)
                index += 1
        assert index == len(state[f"{site.name}:core"])
        return total
    return build


@pytest.mark.parametrize("targets", ["all-linear", ("q", "k", "v"), "up", "down"])
@pytest.mark.parametrize("name", MODELS)
def test_every_slice_is_its_core_between_the_shared_bases(name, targets):
    plain, tuned = changed(name, FacTTT(rank=3, scale=0.75, targets=targets))
    assert_is(tuned, plain, name.removeprefix("square-"), matrix(0.75, 16))


def test_twelve_slices_a_block_share_one_pair_of_bases_as_in_the_paper():
    tuned = attach(square_bert(), [FacTTT(rank=5)])
    assert list(tuned.attached()[0].attachment.shared) == ["square-16"]
    assert sum(len(delta.core) for _, delta in tuned.pairs()) == 2 * 12
    assert tuned.counts()[0] == 5 * (16 + 16) + 24 * 5 ** 2
    for site, delta in tuned.pairs():
        assert [tuple(factor.shape) for factor in delta.factors()] == [(5, site.d_in), (5,), (site.d_out, 5)]


def test_other_shapes_have_bases_of_their_own():
    tuned = attach(toy("llama"), [FacTTT(rank=4)])  # k and v are 8 x 16, the mlp 24 wide
    shared = tuned.attached()[0].attachment.shared
    assert {name: (tuple(bases.down.shape), tuple(bases.up.shape)) for name, bases in shared.items()} == {
        "square-16": ((4, 16), (16, 4)), "8x16": ((4, 16), (8, 4)), "24x16": ((4, 16), (24, 4)), "16x24": ((4, 24), (16, 4))}
    assert tuned.counts()[0] == 4 * (32 + 24 + 40 + 40) + (4 + 4 + 4 + 2) * 4 ** 2


def test_keys_and_values_alone_are_cut_by_their_smaller_side():
    tuned = attach(toy("llama"), [FacTTT(rank=4, targets=("k", "v"))])
    assert list(tuned.attached()[0].attachment.shared) == ["square-8"]
    assert [tuple(delta.core.shape) for _, delta in tuned.pairs()] == [(2, 4, 4)] * 4


def test_a_matrix_larger_than_the_edge_both_ways_is_not_cut():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8), "b": torch.nn.Linear(8, 16), "c": torch.nn.Linear(16, 16)})
    tuned = attach(model, [FacTTT(rank=2, targets="all")])
    assert {name: tuple(bases.up.shape) for name, bases in tuned.attached()[0].attachment.shared.items()} == {
        "square-8": (8, 2), "16x16": (16, 2)}


def test_the_edge_is_the_side_that_most_matrices_have():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8), "b": torch.nn.Linear(16, 4), "c": torch.nn.Linear(16, 32)})
    tuned = attach(model, [FacTTT(rank=2, targets="all")])
    assert list(tuned.attached()[0].attachment.shared) == ["square-16", "8x8", "4x16"]


@pytest.mark.parametrize(("targets", "count"), [("re:.*layer.1.*query", 1), ("re:.*layer.1.*intermediate.dense", 4),
                                                ("re:.*layer.1.output.dense", 4)])
def test_one_layer_alone(targets, count):
    plain, tuned = changed("square-bert", FacTTT(rank=3, targets=targets))
    assert tuned.counts()[0] == 3 * 32 + count * 9
    assert_is(tuned, plain, "bert", matrix(1.0, 16))


def test_initial_values_are_those_of_the_authors_code():
    tuned = attach(square_bert(), [FacTTT(rank=16)])
    bases = tuned.attached()[0].attachment.shared["square-16"]
    assert not bases.up.any()
    bounds = {"down": 0.25, "o": 0.25, "mlp in": 0.25, "mlp out": 0.125}  # 1/sqrt(16), and 1/sqrt(4 * 16)
    found = {"down": bases.down.detach()}
    for site, delta in tuned.pairs():
        found["mlp out" if site.d_in == 64 else "mlp in" if site.d_out == 64 else "o"] = delta.core.detach()
    for key, tensor in found.items():
        assert 0.95 * bounds[key] < float(tensor.abs().max()) <= bounds[key]
        assert float(tensor.std()) == pytest.approx(bounds[key] / 3 ** 0.5, rel=0.15)
