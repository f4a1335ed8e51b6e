"""The stages that train: which runs they want, how rates and candidates are chosen, and what the runs add up to.

Choosing looks at rows held out of train only (seed 0); dev is looked at by the final seeds alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence.catalogue import (
    BASELINE,
    BUDGETS,
    CANDIDATES,
    ONLY_AT,
    RATES,
    SCREEN_RATES,
    SEEDS,
    candidate_named,
    deltas_of,
)
from evidence.runs import HIGHER, PRIMARY, Spec, figure_name, run_all, value_of

SCREEN_BUDGETS, FINAL_BUDGETS, E2E_BUDGETS = ("tiny", "small"), ("tiny", "small", "large"), ("small", "large")
BEST_TSVD = 3
ALWAYS = (BASELINE, "adalora")
Records = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """What the command line gave; None: the stage's own."""

    data: Path
    folder: Path
    workers: int = 1
    candidates: tuple[str, ...] | None = None
    budgets: tuple[str, ...] | None = None
    rates: tuple[float, ...] | None = None
    seeds: tuple[int, ...] | None = None
    limit: int | None = None


def screen(options: Options) -> int:
    """Every candidate at two rates; gives back how many runs failed."""
    candidates = options.candidates or tuple(CANDIDATES)
    specs = held_specs("sst2", candidates, options.budgets or SCREEN_BUDGETS, options.rates or SCREEN_RATES, options.limit)
    return len(specs) - len(run_all(specs, folder=options.folder, stage="screen", data=options.data, workers=options.workers))


def finals(options: Options, known: Records) -> int:
    """Rates for the finalists on held-out rows, then fresh seeds on dev."""
    return _finals("sst2", "finals", options, options.candidates or tuple(finalists(known, options.limit)),
                   options.budgets or FINAL_BUDGETS)


def e2e(options: Options, known: Records) -> int:
    """The same on E2E with fewer candidates."""
    return _finals("e2e", "e2e", options, options.candidates or tuple(e2e_candidates(known, options.limit)),
                   options.budgets or E2E_BUDGETS)


def _finals(task: str, stage: str, options: Options, candidates: Sequence[str], budgets: Sequence[str]) -> int:
    print(f"{stage}: {', '.join(candidates)}", flush=True)
    common = {"folder": options.folder, "stage": stage, "data": options.data, "workers": options.workers}
    trials = held_specs(task, candidates, budgets, options.rates or RATES[task], options.limit)
    tried = run_all(trials, **common)
    specs = []
    for budget in budgets:
        for candidate in candidates:
            rate = best_rate(tried.values(), candidate, budget)
            if rate is None:
                print(f"{candidate} at the {budget} budget has no figure at any rate, so it has no final", flush=True)
                continue
            deltas = deltas_of(candidate, budget, task)
            specs += [Spec(task, "dev", candidate, budget, deltas, rate, seed, options.limit) for seed in options.seeds or SEEDS]
    return len(trials) - len(tried) + len(specs) - len(run_all(specs, **common))


def held_specs(task: str, candidates: Sequence[str], budgets: Sequence[str], rates: Sequence[float],
               limit: int | None) -> list[Spec]:
    """Runs with seed 0 that are judged on rows held out of train.

    Raises:
        SettingsError: a candidate's method or setting does not exist; before anything is trained.
    """
    return [Spec(task, "held", candidate, budget, deltas_of(candidate, budget, task), rate, 0, limit)
            for budget in budgets for candidate in candidates if budget in ONLY_AT.get(candidate, BUDGETS) for rate in rates]


# ---- choosing -------------------------------------------------------------------------------------------------------

def of(records: Iterable[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Records whose spec has these values."""
    return [record for record in records if all(record["spec"][key] == value for key, value in wanted.items())]


def best_record(records: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The best of records of one task and part; None where all diverged."""
    whole = [record for record in records if value_of(record) is not None]
    if not whole:
        return None
    return (max if HIGHER[figure_name(whole[0]["spec"])] else min)(whole, key=lambda record: value_of(record) or 0.0)


def best_rate(records: Iterable[dict[str, Any]], candidate: str, budget: str) -> float | None:
    """The rate with the best figure on held-out rows; None where all diverged."""
    found = best_record(of(records, part="held", candidate=candidate, budget=budget))
    return None if found is None else found["spec"]["rate"]


def screen_score(known: Records, candidate: str, limit: int | None = None) -> float | None:
    """Mean over the screen's budgets of the best loss over its rates; None where it is not screened, or diverged."""
    best = []
    for budget in SCREEN_BUDGETS:
        tried = of(known.values(), task="sst2", part="held", candidate=candidate, budget=budget, limit=limit)
        best.append(best_record(record for record in tried if record["spec"]["rate"] in SCREEN_RATES))
    figures = [value_of(record) for record in best if record is not None]
    return statistics.mean(figures) if len(figures) == len(SCREEN_BUDGETS) else None


def ranked(known: Records, names: Iterable[str], limit: int | None = None) -> list[str]:
    """Screened candidates, the best first."""
    scores = {name: score for name in names if (score := screen_score(known, name, limit)) is not None}
    return sorted(scores, key=lambda name: scores[name])


def finalists(known: Records, limit: int | None = None) -> list[str]:
    """LoRA, AdaLoRA, the best three tsvd besides the control, the best identity (the control), the best of the other methods.

    Raises:
        SystemExit: the screen is not there.
    """
    identity = [name for name in variants("tsvd") if candidate_named(name).get("transform") == "identity"]
    mixing = ranked(known, (name for name in variants("tsvd") if name not in identity), limit)
    chosen = [*mixing[:BEST_TSVD], *ranked(known, identity, limit)[:1]]
    for method in ("tucker1", "fact-tt", "fact-tk"):
        chosen += ranked(known, variants(method), limit)[:1]
    return chosen_or_exit(chosen)


def e2e_candidates(known: Records, limit: int | None = None) -> list[str]:
    """LoRA, AdaLoRA, the screen's best tsvd (control included) and the better tucker1."""
    return chosen_or_exit([*ranked(known, variants("tsvd"), limit)[:1], *ranked(known, variants("tucker1"), limit)[:1]])


def variants(method: str) -> list[str]:
    """The candidates of a method."""
    return [name for name, record in CANDIDATES.items() if record["method"] == method]


def chosen_or_exit(chosen: list[str]) -> list[str]:
    """What was chosen, behind those that are always in."""
    if not chosen:
        raise SystemExit("The screen is not done, so that nothing is chosen: run it first, or give --candidates.")
    return [*ALWAYS, *chosen]


# ---- summaries ------------------------------------------------------------------------------------------------------

def screen_rows(known: Records, limit: int | None = None) -> list[dict[str, Any]]:
    """One row a candidate and budget, the best first."""
    rows = []
    for budget in SCREEN_BUDGETS:
        part = []
        for candidate in candidates_in(known, "sst2", "held", budget, limit):
            tried = [record for record in of(known.values(), task="sst2", part="held", candidate=candidate, budget=budget,
                                             limit=limit) if record["spec"]["rate"] in SCREEN_RATES]
            best = best_record(tried)
            if tried:
                part.append({"budget": budget, "candidate": candidate, "rates": by_rate(tried),
                             "best": None if best is None else value_of(best),
                             "accuracy": None if best is None else best["accuracy"],
                             "ranks": None if best is None else best["ranks"],
                             "parameters": None if best is None else best["final_parameters"],
                             "seconds": None if best is None else best["seconds"]})
        rows += sorted(part, key=lambda row: float("inf") if row["best"] is None else row["best"])
    return rows


def final_rows(known: Records, task: str, limit: int | None = None) -> list[dict[str, Any]]:
    """One row a candidate and budget: rates tried, the chosen one, figures of the seeds, differences paired with LoRA's."""
    rows = []
    for budget in BUDGETS:
        part = []
        for candidate in candidates_in(known, task, "dev", budget, limit):
            runs = of(known.values(), task=task, part="dev", candidate=candidate, budget=budget, limit=limit)
            tried = of(known.values(), task=task, part="held", candidate=candidate, budget=budget, limit=limit)
            baseline = of(known.values(), task=task, part="dev", candidate=BASELINE, budget=budget, limit=limit)
            chosen = of(known.values(), task=task, part="held", candidate=BASELINE, budget=budget, limit=limit)
            part.append(_final_row(at_best_rate(runs, tried), tried, at_best_rate(baseline, chosen)))
        sign = -1 if HIGHER[PRIMARY[task]] else 1
        rows += sorted(part, key=lambda row: sign * (row["mean"] if row["mean"] is not None else sign * float("inf")))
    return rows


def at_best_rate(runs: list[dict[str, Any]], tried: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs at the rate that held-out rows choose: finals of a narrower choice of rates may lie beside them."""
    best = best_record(tried)
    return runs if best is None else of(runs, rate=best["spec"]["rate"]) or runs


def _final_row(runs: list[dict[str, Any]], tried: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    spec = runs[0]["spec"]
    rates = by_rate(tried)
    figures = {str(run["spec"]["seed"]): value_of(run) for run in sorted(runs, key=lambda run: run["spec"]["seed"])}
    whole = [value for value in figures.values() if value is not None]
    against = {str(run["spec"]["seed"]): value_of(run) for run in baseline}
    pairs = [(value, against.get(seed)) for seed, value in figures.items()]
    differences = [mine - its for mine, its in pairs if mine is not None and its is not None]
    done = [run for run in runs if value_of(run) is not None]
    bleus = [run["bleu"]["score"] for run in done if "bleu" in run]
    return {"budget": spec["budget"], "candidate": spec["candidate"], "rate": spec["rate"], "rates": rates,
            "rate_at_border": str(spec["rate"]) in (min(rates, key=float, default=""), max(rates, key=float, default="")),
            "seeds": figures, "mean": statistics.mean(whole) if whole else None, "spread": _spread(whole),
            "difference": statistics.mean(differences) if differences else None, "difference_spread": _spread(differences),
            "bleu": statistics.mean(bleus) if bleus else None, "bleu_spread": _spread(bleus),
            "parameters": statistics.mean(run["final_parameters"] for run in done) if done else None,
            "seconds": statistics.median(run["seconds"] for run in done) if done else None,
            "ranks": done[0]["ranks"] if done else None}


def _spread(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample; None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def by_rate(records: Iterable[dict[str, Any]]) -> dict[str, float | None]:
    """The figure at each rate, in order."""
    return {str(record["spec"]["rate"]): value_of(record) for record in sorted(records, key=lambda each: each["spec"]["rate"])}


def candidates_in(known: Records, task: str, part: str, budget: str, limit: int | None) -> list[str]:
    """Candidates with runs of a kind."""
    return list(dict.fromkeys(record["spec"]["candidate"]
                              for record in of(known.values(), task=task, part=part, budget=budget, limit=limit)))
