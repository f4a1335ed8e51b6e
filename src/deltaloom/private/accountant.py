"""The accountant: what noise is worth, stated for one token and for one sample, composed over all releases; float64 throughout.

Gaussian noise of deviation s on rows of which any two differ by at most D in norm is mu-Gaussian-private with mu = D / s.
Its exact (epsilon, delta) curve is that of Balle & Wang 2018 (arXiv 1805.06530, theorem 8), F the normal distribution function:

    delta(epsilon) = F(mu / 2 - epsilon / mu) - exp(epsilon) F(-mu / 2 - epsilon / mu)

Releases compose exactly: mu^2 adds up (Dong, Roth & Su 2022, arXiv 1905.02383, corollary 3.3), also when later inputs depend on
earlier answers. rho = mu^2 / 2 is zero-concentrated privacy, alpha rho the Renyi divergence of order alpha (Bun & Steinke 2016).
Metric privacy composes by adding eta. No amplification by sampling is claimed: the owner sees which samples a step holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltaloom.errors import CheckpointError, SettingsError

TAIL = -30.0     # below it the error function underflows early, and the series is exact to float64
SEARCH = 200     # halvings of an interval: more than float64 can tell apart
LARGEST = 1e8    # of mu and epsilon; beyond it there is no privacy to speak of


def log_normal_cdf(x: float) -> float:
    """log F(x) of the standard normal, also where F(x) underflows."""
    if x > TAIL:
        return math.log(0.5 * math.erfc(-x / math.sqrt(2)))
    # Mills' ratio as its asymptotic series; at 30 the seventh term is below 1e-15.
    term, total = 1.0, 1.0
    for order in range(1, 8):
        term *= -(2 * order - 1) / (x * x)
        total += term
    return -0.5 * x * x - math.log(-x) - 0.5 * math.log(2 * math.pi) + math.log(total)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """The smallest delta at which mu-Gaussian privacy is (epsilon, delta)-differential privacy."""
    if mu == 0:
        return 0.0
    first = log_normal_cdf(mu / 2 - epsilon / mu)
    second = epsilon + log_normal_cdf(-mu / 2 - epsilon / mu)
    # exp(first) - exp(second), without overflow of exp(epsilon)
    return max(0.0, -math.exp(first) * math.expm1(min(0.0, second - first)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The smallest epsilon for a given delta in (0, 1).

    Raises:
        SettingsError: delta is no probability.
    """
    _check_delta(delta)
    if mu == 0 or gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(mu, high) > delta:
        high *= 2
        if high > LARGEST:
            return math.inf
    return _bisect(lambda epsilon: gaussian_delta(mu, epsilon) > delta, low, high)


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The largest mu that is (epsilon, delta)-private: noise of deviation sensitivity / mu is enough, and no less is.

    Raises:
        SettingsError: epsilon is not positive, or delta is no probability.
    """
    _check_delta(delta)
    if not 0 < epsilon < LARGEST:
        raise SettingsError("epsilon must be positive", got=epsilon)
    low, high = 0.0, 1.0
    while gaussian_delta(high, epsilon) <= delta:
        high *= 2
    return _bisect(lambda mu: gaussian_delta(mu, epsilon) <= delta, low, high, upper=False)


@dataclass(frozen=True)
class Cost:
    """What one release of one row costs.

    `mu` of Gaussian noise; `eta` of metric privacy, per unit of Euclidean distance between rows, and `diameter`, the largest
    distance that two rows can have (None: unbounded, so no epsilon can be stated). All zero and None: nothing was promised.
    """

    mu: float = 0.0
    eta: float = 0.0
    diameter: float | None = None

    @property
    def promised(self) -> bool:
        """Whether there is any noise to account for."""
        return self.mu > 0 or self.eta > 0


@dataclass(frozen=True)
class Spent:
    """What has been spent on one token's row or on one sample: `epsilon` None where none can be stated."""

    releases: int
    mu: float
    eta: float
    epsilon: float | None
    delta: float


class Ledger:
    """What has been released of each sample so far. A repeat counts: the ledger never asks whether it was the same bytes.

    `per_token` is about one transmitted row: whoever sees all releases of that row, and no other row, cannot tell any two rows
    apart better than it says. Rows of one text depend on one another (a layer below the cut mixes tokens), so what all rows
    tell about a text together is `per_sample`: any two texts of at most that many tokens. Trained deltas carry what they learned
    of one text into the rows of others: whatever is told by all rows that were ever sent is `together`.
    """

    def __init__(self) -> None:
        self._samples: dict[str, list[float]] = {}  # releases, mu^2 and eta of a row, the same times rows
        self._unprotected = self._rows = 0
        self._diameter: float | None = 0.0

    def record(self, cost: Cost, tokens: Mapping[str, int], *, further: bool = False) -> None:
        """One release: `tokens` maps each sample's name to the rows that were sent of it.

        `further`: these rows follow others of the same release of the sample (decoding sends one after another).
        """
        if not cost.promised:
            self._unprotected += sum(tokens.values())
        if cost.eta > 0:
            known = self._diameter is not None and cost.diameter is not None
            self._diameter = max(self._diameter or 0.0, cost.diameter or 0.0) if known else None
        for sample, rows in tokens.items():
            held = self._samples.setdefault(sample, [0.0] * 5)
            once = 0.0 if further else 1.0
            for index, more in enumerate((once, once * cost.mu**2, once * cost.eta, cost.mu**2 * rows, cost.eta * rows)):
                held[index] += more
            self._rows += rows

    @property
    def unprotected(self) -> int:
        """Rows that were released without any noise."""
        return self._unprotected

    def per_token(self, delta: float) -> Spent:
        """The worst row of all samples."""
        return self._worst(1, 2, delta)

    def per_sample(self, delta: float) -> Spent:
        """The worst sample."""
        return self._worst(3, 4, delta)

    def together(self, delta: float) -> Spent:
        """All rows of all samples; `releases` counts rows."""
        held = self._samples.values()
        return self._spent(self._rows, sum(each[3] for each in held), sum(each[4] for each in held), delta)

    def _worst(self, squares: int, etas: int, delta: float) -> Spent:
        held = self._samples.values()
        releases = int(max((each[0] for each in held), default=0))
        return self._spent(releases, max((each[squares] for each in held), default=0.0),
                           max((each[etas] for each in held), default=0.0), delta)

    def _spent(self, releases: int, square: float, eta: float, delta: float) -> Spent:
        _check_delta(delta)
        mu = math.sqrt(square)
        epsilon: float | None = None
        if not self._unprotected and (eta == 0 or self._diameter is not None):
            epsilon = (gaussian_epsilon(mu, delta) if mu else 0.0) + eta * (self._diameter or 0.0)
        return Spent(releases, mu, eta, epsilon, delta)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"samples": {name: list(held) for name, held in self._samples.items()}, "unprotected": self._unprotected,
                "diameter": self._diameter, "rows": self._rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave.

        Raises:
            CheckpointError: it is something else; nothing is changed.
        """
        try:
            samples = {str(name): [float(value) for value in held] for name, held in state["samples"].items()}
            unprotected, diameter, rows = int(state["unprotected"]), state["diameter"], int(state["rows"])
            diameter = None if diameter is None else float(diameter)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CheckpointError("this is no state of a privacy ledger", hint="Take the file that the party wrote.") from None
        if any(len(held) != 5 or not all(math.isfinite(v) and v >= 0 for v in held) for held in samples.values()):
            raise CheckpointError("a privacy ledger has samples with impossible amounts")
        self._samples, self._unprotected, self._diameter, self._rows = samples, unprotected, diameter, rows


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise SettingsError("delta must lie between 0 and 1", got=delta, hint="Usual: far below one over the number of tokens.")


def _bisect(left_holds: Any, low: float, high: float, upper: bool = True) -> float:
    """The border of a monotone condition that holds at `low` and not at `high`; the side that is safe."""
    for _ in range(SEARCH):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if left_holds(middle) else (low, middle)
    return high if upper else low
