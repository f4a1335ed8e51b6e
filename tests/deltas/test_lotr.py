import pytest
import torch

from deltaloom.deltas.lotr import LoTR
from deltaloom.tuned import attach
from tests.deltas.dense_changes import MODELS, assert_is, block, changed, square_bert
from tests.toys import toy


def matrix(scale):
    """The dumb way: A G B^T of each layer, term by term."""
    def build(site, state):
        name = f"shared.{site.role}-{site.d_out}x{site.d_in}"
        (core,) = state[f"{site.name}:core"]
        return scale * block(state[f"{name}:up"], core, state[f"{name}:down"])
    return build


@pytest.mark.parametrize("targets", ["all-linear", ("q", "k", "v"), "up", "down"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_its_core_between_the_bases_of_its_role(name, targets):
    plain, tuned = changed(name, LoTR(rank=3, alpha=2.25, targets=targets))
    assert_is(tuned, plain, name.removeprefix("square-"), matrix(0.75))


def test_roles_and_shapes_have_bases_of_their_own():
    tuned = attach(toy("llama"), [LoTR(rank=4)])
    shapes = {name: (len(bases.up), bases.down.shape[1]) for name, bases in tuned.attached()[0].attachment.shared.items()}
    assert shapes == {"q-16x16": (16, 16), "k-8x16": (8, 16), "v-8x16": (8, 16), "o-16x16": (16, 16), "gate-24x16": (24, 16),
                      "up-24x16": (24, 16), "down-16x24": (16, 24)}
    assert tuned.counts()[0] == sum(4 * sum(shape) + 2 * 4 ** 2 for shape in shapes.values())


def test_equal_roles_of_different_shapes_are_groups_of_their_own():
    model = square_bert()
    model.bert.encoder.layer[1].attention.self.query = torch.nn.Linear(16, 24)
    tuned = attach(model, [LoTR(rank=4, targets="q")])
    assert list(tuned.attached()[0].attachment.shared) == ["q-16x16", "q-24x16"]
    assert tuned.counts()[0] == 4 * 32 + 4 ** 2 + 4 * 40 + 4 ** 2


def test_one_layer_alone():
    plain, tuned = changed("llama", LoTR(rank=3, alpha=3.0, targets="k", layers=(1,)))
    assert tuned.counts()[0] == 3 * (8 + 16) + 9
    assert_is(tuned, plain, "llama", matrix(1.0))


def test_bases_start_orthonormal_and_cores_at_zero():
    tuned = attach(toy("llama"), [LoTR(rank=6)])
    for bases in tuned.attached()[0].attachment.shared.values():
        for product in (bases.down @ bases.down.T, bases.up.T @ bases.up):
            torch.testing.assert_close(product, torch.eye(6), rtol=0, atol=1e-5)
    assert not any(delta.core.any() for _, delta in tuned.pairs())
