"""Means against the sums written out, in any dtype and for hostile values."""

import numpy as np
import pytest
import torch

from deltaloom.errors import SettingsError
from deltaloom.private.means.base import PACKAGE, Weighed, mean_named
from deltaloom.private.means.even import Even
from deltaloom.private.means.median import Median
from deltaloom.private.means.trimmed import Trimmed
from deltaloom.private.means.weighted import Weighted
from deltaloom.private.rounds import bounded
from deltaloom.registry import names_in


def updates(count: int, seed: int = 0) -> list[Weighed]:
    generator = torch.Generator().manual_seed(seed)
    return [Weighed({"a": torch.randn(3, 2, generator=generator).double(), "b": torch.randn(4, generator=generator).double()},
                    7 * index + 3) for index in range(count)]


def test_the_folder_is_the_registry():
    assert names_in(PACKAGE) == ["even", "median", "trimmed", "weighted"]
    assert mean_named("trimmed") is Trimmed
    with pytest.raises(SettingsError):
        mean_named("avarage")


@pytest.mark.parametrize("count", (1, 2, 5))
def test_the_weighted_mean_is_the_written_out_sum(count):
    given, total = updates(count), sum(7 * index + 3 for index in range(count))
    for name in ("a", "b"):
        expected = np.zeros(given[0].tensors[name].shape)
        for update in given:
            for place in np.ndindex(expected.shape):
                expected[place] += update.count * float(update.tensors[name][place]) / total
        assert np.allclose(Weighted().combine(given)[name].numpy(), expected, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("count", (1, 2, 5))
def test_the_even_mean_is_numpys_and_knows_no_counts(count):
    given = updates(count)
    for name in ("a", "b"):
        stacked = np.stack([update.tensors[name].numpy() for update in given])
        assert np.allclose(Even().combine(given)[name].numpy(), stacked.mean(axis=0), rtol=1e-14, atol=1e-16)


def test_twice_the_passes_of_two_parties_joined_evenly_are_a_pass_in_one_place():
    """On losses whose gradients stay, for unequal parties; the weighted mean favours the larger one."""
    generator = torch.Generator().manual_seed(0)
    slopes = {name: torch.randn(rows, 4, generator=generator).double() for name, rows in (("large", 30), ("small", 10))}
    rate, start = 0.1, torch.zeros(4).double()
    central = start - rate * torch.cat(list(slopes.values())).sum(dim=0)
    found = {}
    for mean in (Even(), Weighted()):
        common = start
        for _ in range(2):
            updates = [Weighed({"a": common - rate * rows.sum(dim=0)}, len(rows)) for rows in slopes.values()]
            common = mean.combine(updates)["a"]
        found[mean.name] = float((common - central).norm() / central.norm())
    assert found["even"] < 1e-12 and found["weighted"] > 0.3, found


@pytest.mark.parametrize(("mean", "count"), [(Trimmed(trim=1), 5), (Trimmed(trim=2), 5), (Median(), 3), (Median(), 6)])
def test_robust_means_are_numpys_coordinate_by_coordinate(mean, count):
    given = updates(count)
    for name in ("a", "b"):
        stacked = np.sort(np.stack([update.tensors[name].numpy() for update in given]), axis=0)
        oracle = np.median(stacked, axis=0) if isinstance(mean, Median) else stacked[mean.trim:count - mean.trim].mean(axis=0)
        assert np.allclose(mean.combine(given)[name].numpy(), oracle, rtol=1e-14)


@pytest.mark.parametrize("mean", (Trimmed(trim=1), Median()))
def test_one_hostile_party_cannot_move_a_robust_mean_out_of_the_others_range(mean):
    honest = updates(4)
    for evil in (1e30, -1e30):
        poison = Weighed({name: torch.full_like(tensor, evil) for name, tensor in honest[0].tensors.items()}, 10**9)
        for name, value in mean.combine([*honest, poison]).items():
            stacked = torch.stack([update.tensors[name] for update in honest])
            assert bool((value >= stacked.min(0).values).all() and (value <= stacked.max(0).values).all())
    assert float(Weighted().combine([*honest, poison])["a"].abs().max()) > 1e20  # and that it can move the plain one


def test_the_norm_bound_shortens_the_change_and_keeps_its_direction():
    common = {"a": torch.ones(3), "b": torch.zeros(4)}
    values = {"a": torch.tensor([4.0, 1, 1]).double(), "b": torch.tensor([0.0, 4, 0, 0]).double()}
    shortened, short = bounded(values, common, 2.5)
    assert short and torch.allclose(shortened["a"], torch.tensor([2.5, 1, 1]).double())
    assert torch.allclose(shortened["b"], torch.tensor([0.0, 2, 0, 0]).double())
    same, short = bounded(values, common, 5.0)
    assert not short and torch.equal(same["a"], values["a"])
