"""What is compared when methods and combinations are to be chosen: candidates, rates, and how much each run sees."""

from __future__ import annotations

from typing import Any

Deltas = list[dict[str, Any]]

RATES = (1e-3, 3e-3, 1e-2)
FULL_RATES = (3e-5, 1e-4, 3e-4)  # all weights move, each by little
FULL: Deltas = [{"method": "full"}]

# ---- few rows -------------------------------------------------------------------------------------------------------
ROWS = {100: 20.0, 500: 10.0, 1000: 5.0}  # training rows: passes
LOW_SEEDS = (1, 2, 3, 4, 5)
CHOSEN_AT = 500  # rows of the runs on which a candidate's rate is chosen
SINGLE: dict[str, Deltas] = {
    "lora": [{"method": "lora", "rank": 8, "alpha": 16}],
    "bottleneck": [{"method": "bottleneck", "size": 16}],
    "prefix": [{"method": "prefix", "length": 16}],
    "bitfit": [{"method": "bitfit"}],
}
LOW: dict[str, Deltas] = {
    **SINGLE,
    "plain list": [{"method": "bottleneck", "size": 8}, {"method": "prefix", "length": 8},
                   {"method": "lora", "rank": 4, "alpha": 8}],
    "mam": [{"preset": "mam"}],
    "unipelt": [{"preset": "unipelt"}],
    "auto": [{"method": "auto", "budget": "0.25%"}],
    "full": FULL,
}

# ---- one budget -----------------------------------------------------------------------------------------------------
# A quarter of a percent of MiniLM is 56,783 numbers; each candidate is the largest of its kind below: 55,296 of lora and prefix,
# 53,058 of the bottleneck, 26,112 of bitfit, which has no more. adalora counts ranks, so its numbers depend on where they stay.
AUTO_SEEDS = (1, 2, 3)
AT_BUDGET: dict[str, Deltas] = {
    "auto": [{"method": "auto", "budget": "0.25%"}],
    "lora": [{"method": "lora", "rank": 2, "alpha": 4, "targets": ["q", "k", "v"]},
             {"method": "lora", "rank": 1, "alpha": 2, "targets": ["o", "up", "down"]}],
    "adalora": [{"method": "adalora", "rank": 1.3}],
    "tsvd": [{"method": "tsvd", "transform": "dct", "rank": 1.36}],
    "bottleneck": [{"method": "bottleneck", "size": 11}],
    "prefix": [{"method": "prefix", "length": 12}],
    "bitfit": [{"method": "bitfit"}],
}

# ---- sizes ----------------------------------------------------------------------------------------------------------
CAPACITY_SEEDS = (1, 2, 3)
CAPACITY: dict[str, Deltas] = {
    **{f"lora {rank}": [{"method": "lora", "rank": rank, "alpha": 2 * rank}] for rank in (1, 4, 16, 64)},
    **{f"bottleneck {size}": [{"method": "bottleneck", "size": size}] for size in (4, 16, 64, 256)},
    **{f"prefix {length}": [{"method": "prefix", "length": length}] for length in (2, 8, 32, 128)},
    "full": FULL,
}

# ---- kinds of text that are not told apart --------------------------------------------------------------------------
ROUTE_SEEDS = (1, 2, 3)
ROUTE: dict[str, Deltas] = {  # a pool of eight prefixes of four, of which two act, has a prefix of 32's numbers, and a gate
    "route": [{"method": "route", "delta": {"method": "prefix", "length": 4}, "pool": 8, "top": 2}],
    "one prefix": [{"method": "prefix", "length": 32}],
    "one short prefix": [{"method": "prefix", "length": 8}],  # as many tokens as `route` shows a row
}


def rates_of(candidate: str) -> tuple[float, ...]:
    """The rates that are tried."""
    return FULL_RATES if candidate == "full" else RATES
