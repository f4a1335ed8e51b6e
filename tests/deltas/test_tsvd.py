"""The t-SVD tensor delta: equal to its special cases, to materialised changes, and to the t-product's own definitions."""


import pytest
import torch
from torch import nn
from torch.func import functional_call

from deltaloom.deltas.adalora import AdaLoRA
from deltaloom.deltas.tsvd import TSVD
from deltaloom.tuned import attach
from tests.contract.cases import gradients, logits, perturb
from tests.deltas.tensor_oracles import (
    ORTHONORMAL,
    TRANSFORMS,
    deep_bert,
    dense_of_saved,
    groups_of,
    loss_of,
    members,
    new_group,
    train,
    tuned_of,
)
from tests.toys import toy_batch

each_transform = pytest.mark.parametrize("name", TRANSFORMS)
SQUARE = ("q", "k", "v", "o")


# ---- identity is AdaLoRA -----------------------------------------------------------------------------------------------


def parts_by_site(tuned):
    """site -> the rows of up, down, core of its components, with gradients where there are any."""
    found = {}
    for site, delta in tuned.pairs():
        triplets, rows = (delta.triplets, slice(None)) if hasattr(delta, "triplets") else \
            (delta.held[0].triplets, delta.held[0].triplets.block == delta.layer)
        found[site.name] = [value[rows].detach().clone() for parameter in (triplets.up, triplets.core, triplets.down)
                            for value in ((parameter,) if parameter.grad is None else (parameter, parameter.grad))]
        found[site.name].append(triplets.mask[rows].clone())
    return found


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("importance", ["weight-gradient", "gradient"])
def test_identity_is_adalora_over_a_whole_schedule(layers, importance):
    common = {"rank": 2, "reserve": 2, "targets": SQUARE, "orthogonality": 0.3, "every": 2, "importance": importance,
              "start": 0.2, "end": 0.2}
    rank, histories, events = 4, [], []
    flat = attach(deep_bert(layers), [AdaLoRA(penalty="squared", alpha=2.0 * 4 * (rank + 1e-5), **common)]).double()
    tensor = attach(deep_bert(layers), [TSVD(transform="identity", rule="budget", penalty="loss", scale=2.0, **common)]).double()
    with torch.no_grad():
        deltas = dict(flat.pairs())
        for name, each in members(tensor).items():
            own = groups_of(tensor)[name].triplets
            for key in ("up", "core", "down"):
                getattr(own, key).copy_(torch.cat([getattr(deltas[site].triplets, key) for site, _ in each]))
    for tuned in (flat, tensor):
        history, log = [], []

        def look(step, tuned=tuned, history=history):
            history.append((parts_by_site(tuned), {site.name: delta.matrix().detach() for site, delta in tuned.pairs()},
                            float(tuned.penalty().detach())))
        losses = train(tuned, lambda tuned=tuned: loss_of(tuned), 20, log=log, each=look)
        histories.append((losses, history))
        events.append(log)
    torch.testing.assert_close(*(torch.tensor(losses, dtype=torch.float64) for losses, _ in histories), rtol=0, atol=1e-12)
    for (parts, matrices, penalty), (other_parts, other_matrices, other_penalty) in zip(
            *(history for _, history in histories), strict=True):
        assert penalty == pytest.approx(other_penalty, abs=1e-12)
        for site, values in parts.items():
            torch.testing.assert_close(matrices[site], other_matrices[site], rtol=0, atol=1e-12)
            for one, other in zip(values, other_parts[site], strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert len(events[0]) == len(events[1]) > 3
    width = 4 * layers
    for one, other in zip(*events, strict=True):
        scores = [sorted(value for values in event.importance.values() for value in values) for event in (one, other)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-9) and max(scores[0]) > 0
        assert one.parameters == other.parameters and one.residual == pytest.approx(other.residual, rel=1e-9)
    assert sum(len(delta.triplets.core) for delta in deltas.values()) == 2 * width
    assert layers == 1 or len({len(delta.triplets.core) for delta in deltas.values()}) > 1


# ---- special cases and invariants ----------------------------------------------------------------------------------------


def test_of_one_layer_every_orthonormal_transform_is_the_same():
    found = [dense_of_saved(new_group(name, 1)) for name in ORTHONORMAL]
    assert all(torch.equal(found[0], other) for other in found)


def test_of_two_layers_dft_dct_and_haar_are_the_same_in_output_and_gradients():
    results = []
    for name in ("dft", "dct", "haar"):
        tuned = tuned_of(name, layers=2)
        loss = loss_of(tuned)
        loss.backward()
        results.append((loss.detach(), gradients(tuned)))
    for loss, found in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=0, atol=1e-12)
        for key, gradient in results[0][1].items():
            torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ORTHONORMAL)
@pytest.mark.parametrize("layers", [1, 2, 3, 5, 8])
def test_invariants_of_orthonormal_transforms(name, layers):
    d_out, d_in, rank = 24, 40, 2
    group = new_group(name, layers, rank, d_out, d_in, scale=1.0, shaken=False)
    with torch.no_grad():
        group.triplets.core.normal_(generator=torch.Generator().manual_seed(0))
    whole = dense_of_saved(group)
    energy = group.scale ** 2 * group.triplets.core.detach().square().sum()
    torch.testing.assert_close(whole.square().sum(), energy, rtol=1e-5, atol=0)
    coefficients = rank * (layers // 2 + 1) if name == "dft" else rank * layers
    assert int(group.triplets.numbers().sum()) == rank * layers * (d_out + d_in) + coefficients
    for layer in range(layers):
        reaching = int((group.factors(layer)[1] != 0).sum())
        assert torch.linalg.matrix_rank(whole[layer], rtol=1e-9) == min(d_out, reaching)


# ---- factored and materialised -------------------------------------------------------------------------------------------


def materialised(tuned, plain):
    """The same loss from weights that the changes were added to."""
    weights = {f"{site.path}.weight": plain.get_submodule(site.path).weight + delta.matrix() for site, delta in tuned.pairs()}
    return functional_call(plain, weights, (), toy_batch("bert")).loss


@each_transform
@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_and_gradients_are_those_of_materialised_changes(name, checkpointing):
    tuned = tuned_of(name)
    plain = deep_bert().double()
    if checkpointing:
        tuned.checkpoint_activations()
    tuned.train()
    loss = loss_of(tuned)
    loss.backward()
    found = gradients(tuned)
    tuned.zero_grad()
    other = materialised(tuned, plain)
    other.backward()
    torch.testing.assert_close(loss, other, rtol=0, atol=1e-12)
    expected = gradients(tuned)
    assert found.keys() == expected.keys() == tuned.delta_parameters().keys()
    assert name != "learned" or any(key.endswith(":skew") for key in found)
    for key, gradient in expected.items():
        assert gradient.abs().max() > 1e-6, key
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-12)


@each_transform
def test_on_a_base_in_bf16_gradients_are_close_to_exact_ones(name):
    exact = tuned_of(name, targets=("q", "o"))
    tuned = attach(deep_bert().to(torch.bfloat16), [TSVD(rank=2, transform=name, targets=("q", "o"))])
    tuned.load_delta_state({key: tensor.to(tuned.delta_state()[key].dtype) for key, tensor in exact.delta_state().items()})
    exact.model.load_state_dict({key: tensor.double() for key, tensor in tuned.model.state_dict().items()})
    x = torch.randn(4, 9, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    for site, _ in tuned.pairs():
        for one in (tuned, exact):
            layer = one.model.get_submodule(site.path)
            layer(x.to(layer.base.weight.dtype)).square().sum().backward()
    for key, expected in gradients(exact).items():
        gap = (gradients(tuned)[key].double() - expected).norm() / expected.norm()
        assert gradients(tuned)[key].dtype == torch.float32 and gap < 2e-2, key


@pytest.mark.parametrize("name", TRANSFORMS)
def test_nothing_waits_for_backward_but_the_input_and_what_does_not_grow(name):
    def saved(tokens):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(4)))
        tuned = attach(model, [TSVD(rank=3, transform=name, targets="all")])
        perturb(tuned)
        layer, sizes = tuned.model[1], {}
        own = {p.untyped_storage().data_ptr() for p in (*tuned.parameters(), *tuned.buffers())}
        x = torch.randn(tokens, 24, requires_grad=True)
        own.add(x.untyped_storage().data_ptr())

        def pack(tensor):
            place = tensor.untyped_storage().data_ptr()
            if place not in own:
                sizes[place] = max(sizes.get(place, 0), tensor.numel())
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        y.sum().backward()
        return sum(sizes.values())
    rows = len(new_group(name, 4, 5).factors(1)[1])
    assert saved(40) == saved(400) <= 6 * rows * (24 + 24 + 4) + 200


# ---- birth -------------------------------------------------------------------------------------------------------------


@each_transform
def test_at_birth_nothing_changes_and_only_coefficients_get_gradients(name):
    tuned = tuned_of(name, shaken=False, dtype=torch.float32)
    assert torch.equal(logits(tuned, "bert"), logits(deep_bert(), "bert"))
    tuned.train()
    loss_of(tuned).backward()
    for key, gradient in gradients(tuned).items():
        assert bool(gradient.any()) == key.endswith("core"), key
    assert all(delta.orthogonality() < 1e-6 for _, delta in tuned.pairs())
    optimizer = torch.optim.SGD(tuned.delta_parameters().values(), lr=0.1)
    optimizer.step()
    optimizer.zero_grad()
    loss_of(tuned).backward()
    assert all(gradient.any() for gradient in gradients(tuned).values())
