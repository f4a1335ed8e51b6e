"""What the methods with a rank for each site share: settings, patterns of exceptions, the fields of PEFT's LoRA.

Not a method: files whose names begin with _ are no entries of the registry.
"""

from __future__ import annotations

import math
import re
import warnings
from abc import ABC
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field, field_validator

from deltaloom.deltas._peft import PEFT_COMMON, refuse_fields
from deltaloom.deltas.base import Method
from deltaloom.errors import CheckpointError, RefusedError, TargetError
from deltaloom.sites import Site

MOST_PATTERN_LENGTH = 512
MOST_REPEATS = 4      # a name of 100 letters against 4 unbounded repeats is 10^7 steps at worst, and patterns come from files
PEFT_TYPE = "LORA"

PEFT_READ = PEFT_COMMON | {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "fan_in_fan_out", "bias", "rank_pattern",
                           "alpha_pattern", "init_lora_weights", "ensure_weight_tying"}
# Neutral values of fields that are not None, False or empty when unused.
PEFT_NEUTRAL = {"megatron_core": ("megatron.core",), "qalora_group_size": (16,)}
PEFT_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")  # they leave the base's weights alone


class RankedMethod(Method, ABC):
    """A method with one rank and one scale at each site."""

    rank: int = Field(8, ge=1)
    """Rank of the change at each site."""
    alpha: float = Field(16.0, gt=0)
    """Numerator of the scale."""
    rslora: bool = False
    """Scale alpha / sqrt(rank) instead of alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the layer's inputs that the change does not see in training."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Other ranks for some sites: a role, or a regular expression for the end of the path, and the rank."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """Other values of alpha for some sites, in the same way."""

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _check_patterns(cls, patterns: dict[str, float]) -> dict[str, float]:
        for pattern, value in patterns.items():
            problem = pattern_problem(pattern)
            if problem:
                raise ValueError(f"the pattern {pattern!r} {problem}")
            if not value > 0:
                raise ValueError(f"the value of {pattern!r} must be above 0, got {value}")
        return patterns

    def ranks(self, sites: Sequence[Site]) -> dict[Site, tuple[int, float]]:
        """(rank, scale) of each site.

        Raises:
            TargetError: keys of the patterns that match none of the sites, all of them.
        """
        unmatched = [f"{field}: {pattern!r}" for field, patterns in (("rank_pattern", self.rank_pattern),
                                                                     ("alpha_pattern", self.alpha_pattern))
                     for pattern in patterns if not any(matches(pattern, site) for site in sites)]
        if unmatched:
            raise TargetError("patterns match no site of this method", problems=unmatched,
                              legal=sorted({site.path.rsplit(".", 1)[-1] for site in sites}))
        return {site: self._rank_and_scale(site) for site in sites}

    def _rank_and_scale(self, site: Site) -> tuple[int, float]:
        rank = next((value for pattern, value in self.rank_pattern.items() if matches(pattern, site)), self.rank)
        alpha = next((value for pattern, value in self.alpha_pattern.items() if matches(pattern, site)), self.alpha)
        return rank, scale_of(rank, alpha, self.rslora)


def scale_of(rank: int, alpha: float, rslora: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def alpha_of(rank: int, scale: float, rslora: bool) -> float:
    """The alpha that gives this scale; a whole number where it is one but for rounding."""
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    return float(round(alpha)) if abs(alpha - round(alpha)) < 1e-9 * max(1.0, alpha) else alpha


def matches(pattern: str, site: Site) -> bool:
    """Whether a pattern names a site: its role, or as PEFT does, a regular expression for the end of its path."""
    if pattern == site.role:
        return True
    return any(re.match(rf"(.*\.)?({pattern})$", name) is not None for name in {site.path, site.name})


def pattern_problem(pattern: str) -> str:
    """Why a pattern cannot be used; nothing if it can. Patterns come from files, so those that could run for ages are out."""
    if len(pattern) > MOST_PATTERN_LENGTH:
        return f"is longer than {MOST_PATTERN_LENGTH} characters"
    if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > MOST_REPEATS:
        return f"repeats a group, or has more than {MOST_REPEATS} repeats"
    try:
        with warnings.catch_warnings(action="error"):  # of syntax that will mean something else one day
            re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError, FutureWarning, DeprecationWarning) as error:
        return f"is not a regular expression: {error}"
    return ""


def exceptions(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """(most common value, patterns for the paths with another one); the patterns match exactly their path."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {f"^{re.escape(path)}$": value for path, value in values.items() if value != common}


def write_peft_config(method: RankedMethod, ranks: Mapping[str, int], scales: Mapping[str, float], *, transposed: bool,
                      dora: bool) -> dict[str, Any]:
    """The fields of PEFT's LoRA for a rank and a scale at each module path."""
    rank, rank_pattern = exceptions(ranks)
    alpha, alpha_pattern = exceptions({path: alpha_of(ranks[path], scales[path], method.rslora) for path in ranks})
    return {"peft_type": PEFT_TYPE, "r": int(rank), "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": method.dropout, "use_rslora": method.rslora, "use_dora": dora, "fan_in_fan_out": transposed,
            "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
            "init_lora_weights": True, "bias": "none", "target_modules": list(ranks)}


def read_peft_settings(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    """Settings from the fields of PEFT's LoRA, checked against the ranks that the tensors have.

    Raises:
        RefusedError: fields that change the meaning and are not understood. CheckpointError: other ranks than the tensors'.
    """
    refuse_fields(config, PEFT_READ, PEFT_NEUTRAL)
    init = config.get("init_lora_weights", True)
    if isinstance(init, (dict, list)) or init not in PEFT_PLAIN_INITS:
        raise RefusedError("this adapter belongs to a base whose weights its initialisation changed",
                           got=f"init_lora_weights={init}",
                           hint="Save it from PEFT with `path_initial_model_for_weight_conversion`, which makes it a plain one.")
    rank_pattern, alpha_pattern = (_own_patterns(config.get(key), key, ranks) for key in ("rank_pattern", "alpha_pattern"))
    return {"rank": config.get("r", 8), "alpha": config.get("lora_alpha", 8), "rslora": bool(config.get("use_rslora")),
            "dropout": config.get("lora_dropout") or 0.0, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}


def _own_patterns(patterns: object, key: str, paths: Iterable[str]) -> dict[str, Any]:
    if patterns is None:
        return {}
    if not isinstance(patterns, dict) or len(patterns) > 10_000:
        raise CheckpointError(f"adapter_config.json: '{key}' must be a mapping of patterns to values")
    problems = [f"{key}: {pattern!r} {problem}" for pattern in patterns if (problem := pattern_problem(pattern))]
    if problems:
        raise RefusedError("patterns of this adapter cannot be used", problems=problems)
    # a key without a match has no effect in PEFT, and would be an error here
    return {pattern: value for pattern, value in patterns.items()
            if any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths)}


def check_peft_ranks(method: RankedMethod, sites: Mapping[str, Site], ranks: Mapping[str, int]) -> None:
    """Compare the ranks that the settings give with the tensors'.

    Raises:
        CheckpointError: they differ (PEFT itself would say nothing, or only that sizes do not match).
    """
    expected = {site.path: rank for site, (rank, _) in method.ranks(list(sites.values())).items()}
    problems = [f"{path}: rank {expected[path]} by adapter_config.json, {rank} in the tensors"
                for path, rank in ranks.items() if expected[path] != rank]
    if problems:
        raise CheckpointError("the adapter's configuration does not fit its tensors", problems=problems[:20])
