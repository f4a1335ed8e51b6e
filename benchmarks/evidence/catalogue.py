"""What is compared: budgets, rates, and the settings of every candidate. Change names of settings here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import deltaloom
from deltaloom.deltas.base import method_from
from deltaloom.errors import RefusedError
from deltaloom.jobs.estimate import block_linears
from deltaloom.sites import Site, all_sites
from deltaloom.tuned import attach

MODELS = {"sst2": ("bundled:minilm", "sequence-classification"), "e2e": ("bundled:smollm2-135m-instruct", "causal-lm")}
BUDGETS = {"tiny": 0.1, "small": 1, "large": 4}  # rank of LoRA on all block linears that has as many parameters
RATES = {"sst2": (3e-3, 5e-3, 1e-2), "e2e": (2e-3, 6e-3, 2e-2)}
SCREEN_RATES = (3e-3, 1e-2)  # two of those above, so that the finals' choice of a rate goes on from the screen's runs
SEEDS = (1, 2, 3)  # of the finals; rates and candidates are chosen with seed 0
BASELINE = "lora"

TRANSFORMS = ("identity", "dft", "dct", "haar", "data", "frame")
RULED = ("identity", "frame")  # transforms with which the rank rules and importances are compared
AT_THE_BUDGET = ("dct", "haar")  # with these `capped` left some tiny runs far below their budget: what if it stays there?
NARROW = ("q", "v")          # where LoRA sits at the tiny budget: is it the place that makes the difference there?
DEFAULTS = {"granularity": "entry", "rule": "capped", "importance": "weight-gradient"}
WAYS = {"fixed": {"rule": "fixed", "reserve": 1}, "tube": {**DEFAULTS, "granularity": "tube"}, "entry": DEFAULTS}


def _tsvd(transform: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {"method": "tsvd", "transform": transform, **settings}


# Without `rank`, which the budget decides.
CANDIDATES: dict[str, dict[str, Any]] = {
    BASELINE: {"method": "lora"},
    "adalora": {"method": "adalora"},
    "adalora-256": {"method": "adalora", "alpha": 256},  # its vectors start at a fortieth of the others' product
    "adalora-all": {"method": "adalora"},  # tiny: from rank 1 on all sites down to a tenth, so it starts far above the budget
    "tucker1-random": {"method": "tucker1", "basis": "random"},
    "tucker1-gradient": {"method": "tucker1", "basis": "gradient"},
    "fact-tt": {"method": "fact-tt"},
    "fact-tk": {"method": "fact-tk"},
    "fact-tt-10": {"method": "fact-tt", "scale": 10},  # its authors choose the scale for each task
    "fact-tk-10": {"method": "fact-tk", "scale": 10},
    "lotr": {"method": "lotr"},
    **{f"tsvd-{transform}-{way}": _tsvd(transform, settings) for transform in TRANSFORMS for way, settings in WAYS.items()},
    **{f"tsvd-{transform}-{rule}": _tsvd(transform, {**DEFAULTS, "rule": rule})
       for transform in RULED for rule in ("budget", "share", "effective")},
    **{f"tsvd-{transform}-budget": _tsvd(transform, {**DEFAULTS, "rule": "budget"}) for transform in AT_THE_BUDGET},
    **{f"tsvd-{transform}-gradient": _tsvd(transform, {**DEFAULTS, "importance": "gradient"}) for transform in RULED},
    **{f"tsvd-{transform}-qv": _tsvd(transform, {**DEFAULTS, "roles": NARROW}) for transform in AT_THE_BUDGET},
    "tsvd-literal": {"method": "tsvd", "preset": "literal"},
}
ONLY_AT = {"adalora-all": ("tiny",)}  # elsewhere it is what another candidate is
STAND_INS = {"dora": {"method": "dora"}}  # for trials of the scripts before a method is there
WHOLE_RANKS = ("lora", "adalora", "dora")  # these, and fixed ranks, sit on fewer sites below rank 1
SHARED_SIDE = "tucker1"                    # has a higher rank than LoRA at the same parameters, one side being shared
FITTED = ("fact-tt", "fact-tk", "lotr")    # their rank is not LoRA's: the one whose parameters come nearest is taken


def candidate_named(name: str) -> dict[str, Any]:
    """The settings of a candidate; a name that is no candidate is taken as a method's."""
    return {**CANDIDATES, **STAND_INS}.get(name, {"method": name})


def deltas_of(candidate: str, budget: str, task: str) -> list[dict[str, Any]]:
    """The `deltas` section of a run file for a candidate at a budget.

    Raises:
        SettingsError: the method does not exist, or not with these settings.
    """
    record, share = dict(candidate_named(candidate)), BUDGETS[budget]
    roles = record.pop("roles", None)
    if roles is not None:
        chosen = [site for site in block_sites(task) if site.role in roles]
        rank = budget_parameters(budget, task) / parameters_of(chosen)
        record = {**record, "targets": [site.path for site in chosen], "rank": rank}
    elif record["method"] in FITTED:
        record = {**record, "rank": fitted_rank(candidate, budget, task)}
    elif record["method"] == SHARED_SIDE:
        record = {**record, **shared_side(share, task)}
    elif share < 1 and (candidate in WHOLE_RANKS or record.get("rule") == "fixed"):
        record = {**record, "rank": 1, "targets": fewer_sites(block_sites(task), share)}
    else:
        record = {**record, "rank": share}
    if record["method"] == BASELINE:
        record["alpha"] = 2 * record["rank"]
    method_from(record, f"candidate {candidate}")
    return [record]


@lru_cache
def shared_side(share: float, task: str) -> dict[str, float]:
    """Rank and size of bases at which one shared and one private side have as many parameters as LoRA's two private ones."""
    tuned = attach(_model(task), [method_from({"method": SHARED_SIDE, "rank": 1, "size": 1}, "one row")])
    row = sum(p.numel() for module in tuned.attached()[0].attachment.shared.values() for p in module.parameters())
    private = tuned.counts()[0] - row
    tuned.detach()
    both = share * sum(site.d_in + site.d_out for site in block_sites(task))
    size = max(2, math.ceil(1.5 * both / (row + private)))
    return {"size": size, "rank": round((both - size * row) / private, 6)}


def fewer_sites(sites: Sequence[Site], share: float) -> list[str]:
    """Paths of sites on which LoRA rank 1 has about `share` of its parameters on all of them.

    Value and query of the last block, then of the one before, and so on, as long as each one more comes nearer.
    """
    wanted = share * sum(site.d_in + site.d_out for site in sites)
    order = sorted((site for site in sites if site.role in ("q", "v")), key=lambda site: (-(site.layer or 0), site.role != "v"))
    chosen: list[str] = []
    size = 0
    for site in order:
        more = size + site.d_in + site.d_out
        if abs(more - wanted) >= abs(size - wanted):
            break
        chosen, size = [*chosen, site.path], more
    return chosen


@lru_cache
def _model(task: str) -> Any:
    source, kind = MODELS[task]
    return deltaloom.load_model(source, task=kind).model


def block_sites(task: str) -> list[Site]:
    """The linears inside the blocks of a task's model."""
    return block_linears(all_sites(_model(task)))


def budget_parameters(budget: str, task: str) -> int:
    """Parameters that a budget stands for."""
    return round(BUDGETS[budget] * parameters_of(block_sites(task)))


def parameters_of(sites: Sequence[Site]) -> int:
    """Those of LoRA rank 1."""
    return sum(site.d_in + site.d_out for site in sites)


@lru_cache
def fitted_rank(candidate: str, budget: str, task: str) -> int:
    """The rank whose parameters come nearest to the budget."""
    wanted = budget_parameters(budget, task)

    @lru_cache
    def size(rank: int) -> float:
        method = method_from({**candidate_named(candidate), "rank": rank}, f"candidate {candidate}")
        try:
            tuned = attach(_model(task), [method])
        except RefusedError:  # more than the layers can have
            return math.inf
        parameters = tuned.counts()[0]
        tuned.detach()
        return parameters

    return nearest(size, wanted)


def nearest(size: Callable[[int], float], wanted: int) -> int:
    """The rank, at least 1, whose size comes nearest to `wanted`; sizes grow with the rank."""
    low = high = 1
    while size(high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < wanted else (low, middle)
    return min((low, high), key=lambda rank: abs(size(rank) - wanted))
