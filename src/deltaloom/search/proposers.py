"""Samplers and pruners of Optuna by name, and Optuna itself, which nothing imports before a search begins."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deltaloom.errors import SettingsError, UsageError

if TYPE_CHECKING:
    import optuna
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

INSTALL = "pip install 'deltaloom[search]'"
FIRST_RANDOM = 10  # trials before a model of the results proposes, at most; of short searches a quarter
LET_RUN = 4        # trials that are not pruned, so that there is something to compare with


def need_optuna() -> None:
    """Import Optuna, and let it speak only when something is wrong.

    Raises:
        UsageError: it is not installed.
    """
    try:
        library = importlib.import_module("optuna")
    except ImportError:
        raise UsageError("a search needs Optuna, which is not installed", hint=f"Run {INSTALL}.") from None
    library.logging.set_verbosity(library.logging.WARNING)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's remarks on features that may change and on too few trials."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_sampler(name: str, seed: int, trials: int) -> BaseSampler:
    """The sampler of a search of that many trials.

    Raises:
        SettingsError: it needs a library that is not installed.
    """
    import optuna

    first = max(2, min(FIRST_RANDOM, trials // 4))
    samplers = optuna.samplers
    makers: dict[str, Callable[[], BaseSampler]] = {
        "tpe": lambda: samplers.TPESampler(seed=seed, n_startup_trials=first),
        "random": lambda: samplers.RandomSampler(seed=seed),
        "gp": lambda: samplers.GPSampler(seed=seed, n_startup_trials=first, warn_independent_sampling=False),
        "nsga2": lambda: samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, trials // 4))),
        "grid": lambda: samplers.RandomSampler(seed=seed),  # the study proposes; this one fills nothing in
    }
    check_sampler(name)
    with quiet():
        return makers[name]()


def check_sampler(name: str) -> None:
    """That what a sampler needs is installed.

    Raises:
        SettingsError: it is not.
    """
    if name == "gp" and importlib.util.find_spec("scipy") is None:
        raise SettingsError("search.sampler: gp needs SciPy, which is not installed", hint="Run pip install scipy, or take tpe.")


def make_pruner(name: str) -> BasePruner:
    """The pruner; one resource unit is one evaluation."""
    import optuna

    pruners = optuna.pruners
    makers: dict[str, Callable[[], BasePruner]] = {
        "none": pruners.NopPruner,
        "median": lambda: pruners.MedianPruner(n_startup_trials=LET_RUN),
        "asha": lambda: pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
        "hyperband": lambda: pruners.HyperbandPruner(min_resource=1, reduction_factor=3),
    }
    with quiet():
        return makers[name]()


def importances(study: optuna.Study, target: int) -> dict[str, float]:
    """How much each setting decides whether the objective of index `target` is among the best, from 0 to 1, summing to 1.

    Conditional PED-ANOVA (Watanabe et al., IJCAI 2023; its extension to conditional settings, KDD 2026), which needs nothing
    besides Optuna. Empty where too few trials are complete to say anything.
    """
    import optuna

    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if len(done) < 4:
        return {}
    sign = 1.0 if study.directions[target] == optuna.study.StudyDirection.MINIMIZE else -1.0
    with quiet():
        found = optuna.importance.get_param_importances(study, target=lambda trial: sign * trial.values[target])
    return {name: float(value) for name, value in found.items()}
