"""The accountant against closed forms, a numerical integral of the definition, and brute composition."""

import math

import numpy as np
import pytest
from scipy import integrate, stats

from deltaloom.errors import CheckpointError, SettingsError
from deltaloom.private.accountant import (
    Cost,
    Ledger,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    log_normal_cdf,
)

MUS = (0.05, 0.3, 1.0, 2.5, 7.0)


def integrated_delta(mu: float, epsilon: float) -> float:
    """sup over events of P(A) - e^epsilon Q(A), by integrating the positive part of the difference of the two densities."""
    def excess(x: float) -> float:
        return max(0.0, stats.norm.pdf(x, mu) - math.exp(epsilon) * stats.norm.pdf(x))
    start = epsilon / mu + mu / 2  # where the difference turns positive
    return integrate.quad(excess, start, max(start, mu) + 12, limit=200)[0]


@pytest.mark.parametrize("mu", MUS)
@pytest.mark.parametrize("epsilon", (0.0, 0.1, 1.0, 4.0))
def test_delta_is_the_integral_of_the_definition(mu, epsilon):
    assert gaussian_delta(mu, epsilon) == pytest.approx(integrated_delta(mu, epsilon), rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("mu", MUS)
def test_at_epsilon_zero_delta_is_the_total_variation(mu):
    assert gaussian_delta(mu, 0.0) == pytest.approx(2 * stats.norm.cdf(mu / 2) - 1, rel=1e-9)


@pytest.mark.parametrize("x", (-300.0, -40.0, -31.0, -30.0, -29.9, -5.0, 0.0, 3.0))
def test_the_log_of_the_distribution_function(x):
    assert log_normal_cdf(x) == pytest.approx(stats.norm.logcdf(x), rel=1e-12)


@pytest.mark.parametrize("delta", (1e-9, 1e-5, 0.01))
@pytest.mark.parametrize("epsilon", (0.01, 0.5, 3.0, 50.0))
def test_calibration_and_its_inverse_agree_on_the_safe_side(epsilon, delta):
    mu = gaussian_mu(epsilon, delta)
    assert gaussian_delta(mu, epsilon) <= delta * (1 + 1e-9)
    assert gaussian_delta(mu * 1.001, epsilon) > delta
    assert gaussian_epsilon(mu, delta) == pytest.approx(epsilon, rel=1e-6)


def test_the_analytic_noise_is_less_than_the_classical_one():
    # Dwork & Roth 2014, theorem A.1: sigma = sqrt(2 log(1.25 / delta)) / epsilon, for epsilon < 1 and sensitivity 1
    for epsilon in (0.1, 0.5, 0.9):
        assert 1 / gaussian_mu(epsilon, 1e-5) < math.sqrt(2 * math.log(1.25e5)) / epsilon


@pytest.mark.parametrize("mu", MUS)
def test_the_classical_conversion_never_promises_more(mu):
    for delta in (1e-9, 1e-5, 1e-2):
        rho = mu * mu / 2  # zero-concentrated privacy
        assert gaussian_epsilon(mu, delta) <= rho + 2 * math.sqrt(rho * math.log(1 / delta))


def test_composition_is_exact_for_two_releases():
    """Two releases of mu1, mu2 together: a plane of two coordinates; the best event is a half-plane across mu."""
    mu1, mu2, epsilon = 0.7, 1.1, 0.8
    step = 0.02
    grid = np.arange(-9, 11, step)
    x, y = np.meshgrid(grid, grid)
    p = stats.norm.pdf(x, mu1) * stats.norm.pdf(y, mu2)
    q = stats.norm.pdf(x) * stats.norm.pdf(y)
    brute = np.maximum(p - math.exp(epsilon) * q, 0).sum() * step * step
    assert gaussian_delta(math.hypot(mu1, mu2), epsilon) == pytest.approx(brute, rel=1e-3)


def test_the_ledger_is_the_written_out_sum():
    ledger = Ledger()
    cost = Cost(mu=0.2)
    for _ in range(3):
        ledger.record(cost, {"a": 10, "b": 4})
    ledger.record(cost, {"b": 4})
    token, sample = ledger.per_token(1e-5), ledger.per_sample(1e-5)
    assert (token.releases, token.mu) == (4, pytest.approx(0.2 * 2))
    assert sample.mu == pytest.approx(0.2 * math.sqrt(30))
    assert token.epsilon == gaussian_epsilon(token.mu, 1e-5) and sample.epsilon == gaussian_epsilon(sample.mu, 1e-5)


def test_metric_privacy_adds_up_and_needs_a_bound_for_an_epsilon():
    ledger = Ledger()
    for _ in range(5):
        ledger.record(Cost(eta=2.0, diameter=3.0), {"a": 7})
    assert (ledger.per_token(1e-6).eta, ledger.per_token(1e-6).epsilon) == (10.0, 30.0)
    assert ledger.per_sample(1e-6).epsilon == 210.0
    ledger.record(Cost(eta=2.0), {"a": 7})
    ledger.record(Cost(eta=2.0, diameter=3.0), {"a": 7})
    assert ledger.per_token(1e-6).epsilon is None


def test_what_was_sent_without_noise_is_counted_and_ends_every_promise():
    ledger = Ledger()
    ledger.record(Cost(mu=0.1), {"a": 2})
    ledger.record(Cost(), {"a": 2, "b": 3})
    assert ledger.unprotected == 5 and ledger.per_token(1e-5).epsilon is None


def test_the_ledger_comes_back_and_refuses_what_is_none():
    ledger, again = Ledger(), Ledger()
    ledger.record(Cost(mu=0.3, eta=0.1, diameter=2.0), {"a": 2})
    again.load_state_dict(ledger.state_dict())
    assert again.state_dict() == ledger.state_dict() and again.per_sample(1e-5) == ledger.per_sample(1e-5)
    for bad in ({}, {"samples": {"a": [1.0]}, "unprotected": 0, "diameter": 0}, {"samples": 3, "unprotected": 0, "diameter": 0},
                {"samples": {"a": [math.nan] * 5}, "unprotected": 0, "diameter": None}):
        with pytest.raises(CheckpointError):
            again.load_state_dict(bad)
    assert again.state_dict() == ledger.state_dict()


@pytest.mark.parametrize("delta", (0.0, 1.0, -1.0))
def test_a_delta_that_is_no_probability_is_refused(delta):
    with pytest.raises(SettingsError):
        gaussian_epsilon(1.0, delta)
    with pytest.raises(SettingsError):
        gaussian_mu(1.0, delta)
    with pytest.raises(SettingsError):
        gaussian_mu(-1.0, 1e-5)
