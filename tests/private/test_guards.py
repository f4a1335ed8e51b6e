"""Guards of rows: distributions, the backward pass, repeats, the chain."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from deltaloom.errors import SettingsError
from deltaloom.private.accountant import gaussian_delta
from deltaloom.private.guards._noise import KEY_BYTES, Noise, new_key
from deltaloom.private.guards.base import PACKAGE, Chain, RowGuard, guard_named, parse_guards
from deltaloom.private.guards.clip import Clip
from deltaloom.private.guards.dx_privacy import DxPrivacy
from deltaloom.private.guards.gaussian import Gaussian
from deltaloom.private.messages import Guard, GuardContext, Key
from deltaloom.registry import names_in

KEY = bytes(range(KEY_BYTES))
ROW_GUARDS = [Clip(norm=1.5), Gaussian(norm=1.5, sigma=0.4), DxPrivacy(eta=3.0)]


def at(step: int = 1, micro: int = 0, crossing: str = "hidden") -> GuardContext:
    return GuardContext(crossing, "training", Key(step, micro))


def rows(count: int = 5, width: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def sent(guard: RowGuard, x: torch.Tensor, **place: int) -> torch.Tensor:
    return Chain([guard], KEY).outgoing(x, at(**place))


def test_the_folder_is_the_registry():
    assert names_in(PACKAGE) == ["clip", "dx-privacy", "gaussian", "masks"]
    for name in names_in(PACKAGE):
        cls = guard_named(name)
        assert cls.protects and cls.leaves and "Protects" in (cls.__doc__ or "") and "Leaves" in (cls.__doc__ or "")


def test_guards_come_from_mappings():
    assert parse_guards([{"guard": "gaussian", "norm": 2, "sigma": 1}, {"guard": "masks"}])[0] == Gaussian(norm=2, sigma=1)
    for bad in (3, [3], [{}], [{"guard": "nothing"}], [{"guard": "clip", "nrom": 1}], [{"guard": 5}]):
        with pytest.raises(SettingsError):
            parse_guards(bad)


@pytest.mark.parametrize("guard", ROW_GUARDS, ids=lambda guard: guard.name)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", ((5, 8), (2, 3, 8), (1, 1), (0, 8)))
def test_shape_and_dtype_stay(guard, dtype, shape):
    x = torch.ones(shape, dtype=dtype)
    z = sent(guard, x)
    assert (z.shape, z.dtype) == (x.shape, dtype) and bool(z.isfinite().all())


def test_a_chain_is_what_messages_call_a_guard():
    chain: Guard = Chain(ROW_GUARDS[:2], KEY)
    assert chain.name == "clip+gaussian"


@pytest.mark.parametrize("guard", ROW_GUARDS[1:], ids=lambda guard: guard.name)
def test_a_repeat_is_the_same_and_everything_else_is_independent(guard):
    x = rows()
    first = sent(guard, x)
    assert torch.equal(first, sent(guard, x.clone()))
    other_key = Chain([guard], new_key()).outgoing(x, at())
    nudged = x.clone()
    nudged[0, 0] += 1e-3
    for different in (sent(guard, x, step=2), sent(guard, x, micro=1), other_key, sent(guard, nudged)):
        assert bool(((first - different)[1:].abs() > 1e-6).all())  # all rows, also those that the nudge left as they were


def test_a_gaussian_guard_is_a_clip_and_the_stated_noise():
    x = rows(4000, 16) * 3
    guard = Gaussian(norm=2.0, sigma=0.7)
    clipped = x / x.norm(dim=1, keepdim=True).clamp(min=2.0) * 2.0
    assert torch.allclose(guard.centre(x), clipped, atol=1e-6)
    noise = (sent(guard, x) - clipped).flatten().double().numpy() / 0.7
    assert stats.kstest(noise, "norm").pvalue > 0.01
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 4 / math.sqrt(len(noise))


def test_the_noise_follows_from_epsilon_and_delta():
    guard = Gaussian(norm=2.0, epsilon=3.0, delta=1e-5)
    mu = Chain([guard], KEY).cost().mu
    assert mu == pytest.approx(4.0 / guard.deviation)
    assert gaussian_delta(mu, 3.0) == pytest.approx(1e-5, rel=1e-6)


def test_dx_noise_has_a_gamma_radius_and_a_uniform_direction():
    width, eta = 12, 2.5
    x = torch.zeros(4000, width, dtype=torch.float64)
    noise = sent(DxPrivacy(eta=eta), x).numpy()
    radius = np.linalg.norm(noise, axis=1)
    assert stats.kstest(radius, "gamma", args=(width, 0, 1 / eta)).pvalue > 0.01
    # a coordinate of a uniform direction: its square is Beta(1/2, (d-1)/2); its sign is fair
    direction = noise / radius[:, None]
    for axis in range(width):
        assert stats.kstest(direction[:, axis] ** 2, "beta", args=(0.5, (width - 1) / 2)).pvalue > 1e-3
    assert np.abs(direction.mean(axis=0)).max() < 4.5 / math.sqrt(width * 4000)
    assert np.abs(np.corrcoef(direction.T) - np.eye(width)).max() < 4.5 / math.sqrt(4000)
    assert abs(np.corrcoef(radius, direction[:, 0])[0, 1]) < 4 / math.sqrt(4000)


def test_the_published_shortcut_is_another_distribution():
    """One Gamma and one uniform number per coordinate, as found in the wild: the test above has to tell it apart."""
    generator = np.random.default_rng(0)
    wrong = generator.gamma(12, 1 / 2.5, (4000, 12)) * generator.uniform(-1, 1, (4000, 12))
    assert stats.kstest(np.linalg.norm(wrong, axis=1), "gamma", args=(12, 0, 1 / 2.5)).pvalue < 1e-6


def test_in_one_dimension_dx_noise_is_laplace_and_its_odds_are_bounded():
    x = torch.zeros(20000, 1, dtype=torch.float64)
    noise = sent(DxPrivacy(eta=2.0), x).flatten().numpy()
    assert stats.kstest(noise, "laplace", args=(0, 0.5)).pvalue > 0.01


@pytest.mark.parametrize("guard", ROW_GUARDS, ids=lambda guard: guard.name)
def test_the_backward_pass_is_that_of_the_forward_values(guard):
    """At the party the noise is a constant and the clip has its Jacobian: autograd against finite differences of `centre`."""
    x = (rows(4, 6, torch.float64) * 2).requires_grad_()
    upstream = rows(4, 6, torch.float64)
    (gradient,) = torch.autograd.grad(sent(guard, x), x, upstream)
    numeric = torch.zeros_like(gradient)
    with torch.no_grad():
        for index in range(x.numel()):
            step = torch.zeros(x.numel(), dtype=torch.float64)
            step[index] = 1e-6
            ahead, behind = guard.centre(x + step.view_as(x)), guard.centre(x - step.view_as(x))
            numeric.view(-1)[index] = ((ahead - behind) / 2e-6 * upstream).sum()
    assert torch.allclose(gradient, numeric, atol=1e-8)


def test_the_owner_sees_a_gradient_taken_at_the_guarded_values():
    """What the back computes depends on what it was sent and on nothing else: no further privacy is spent."""
    x = rows(4, 6).requires_grad_()
    z = sent(Gaussian(norm=1.0, sigma=1.0), x)
    received = z.detach().requires_grad_()
    (at_owner,) = torch.autograd.grad((received**3).sum(), received)
    (end_to_end,) = torch.autograd.grad((z**3).sum(), x, retain_graph=True)
    (split,) = torch.autograd.grad(z, x, at_owner)
    assert torch.equal(split, end_to_end)


def test_gradients_are_guarded_only_if_asked_for():
    x = rows()
    chain = Chain([Gaussian(norm=1.0, sigma=1.0)], KEY)
    assert chain.outgoing(x, at(crossing="gradient")) is x and chain.cost("gradient").promised is False
    chain = Chain([Gaussian(norm=1.0, sigma=1.0), Gaussian(norm=0.1, sigma=2.0, crossing="gradient")], KEY)
    assert not torch.equal(chain.outgoing(x, at(crossing="gradient")), x)
    assert chain.cost("gradient").mu == pytest.approx(0.1)


def test_a_clip_bounds_what_dx_privacy_can_state():
    assert Chain([DxPrivacy(eta=2.0)], KEY).cost().diameter is None
    assert Chain([Clip(norm=3.0), DxPrivacy(eta=2.0)], KEY).cost().diameter == 6.0
    assert Chain([Clip(norm=1.0), Gaussian(norm=3.0, sigma=2.0)], KEY).cost().mu == pytest.approx(1.0)
    assert Chain([Gaussian(norm=3.0, sigma=2.0), Clip(norm=1.0)], KEY).cost().mu == pytest.approx(3.0)


def test_chains_and_settings_that_mean_nothing_are_refused():
    with pytest.raises(SettingsError, match="more than one"):
        Chain([Gaussian(norm=1, sigma=1), DxPrivacy(eta=1)], KEY)
    with pytest.raises(SettingsError, match="updates"):
        Chain([guard_named("masks")()], KEY)
    for bad in ({"norm": 1}, {"norm": 1, "sigma": 1, "epsilon": 1, "delta": 1e-5}, {"norm": 1, "epsilon": 1},
                {"norm": 0, "sigma": 1}, {"norm": 1, "sigma": -1}, {"norm": 1, "sigma": math.inf}):
        with pytest.raises(SettingsError):
            Gaussian(**bad)
    with pytest.raises(SettingsError, match="32 bytes"):
        Noise(b"short", "", 0, rows())


def test_no_row_leaves_longer_than_the_norm():
    x = torch.randn(2000, 33, generator=torch.Generator().manual_seed(1)).double() * torch.logspace(-30, 30, 2000)[:, None]
    assert float(Clip(norm=0.3).centre(x).norm(dim=1).max()) <= 0.3 * (1 + 1e-14)
    assert torch.equal(Clip(norm=10.0).centre(torch.zeros(2, 3)), torch.zeros(2, 3))
