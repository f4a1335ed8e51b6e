"""Compression of SmolLM2 measured on held-out text; every stage is one command, and goes on where it was stopped.

    python benchmarks/compression.py lowrank  --data DIR   # plain against whitened SVD, and shared bases, at ratios 0.5 to 0.9
    python benchmarks/compression.py zeros    --data DIR   # magnitude against Wanda: half of the weights, and 2 of 4
    python benchmarks/compression.py layers   --data DIR   # which blocks to drop: 20% and 40% of them
    python benchmarks/compression.py repair   --data DIR   # healing and distilling after dropping, low rank and pruning
    python benchmarks/compression.py speed    --data DIR   # what structure saves of the time per generated token
    python benchmarks/compression.py quantise --data DIR   # int8, nf4, int4 by rounding and by GPTQ, corrections
    python benchmarks/compression.py report                # the tables of docs/results/compression.md

Each finished compression is a line of benchmarks/results/compression.jsonl. DIR holds e2e and sst2 (train and dev) and
gsm8k.train. Rows to calibrate and train on come from the train files, held-out rows from the dev files and from gsm8k's last
200 rows, without those that occur in the former. All settings were fixed before the first look at held-out figures.
For a trial: `--limit ROWS --results ELSEWHERE.jsonl --only svd-0.5`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from evidence.runs import append, read_lines

from deltaloom.errors import DeltaloomError
from deltaloom.jobs.compress import compress
from deltaloom.jobs.compressfile import parse_compress

MODEL = "bundled:smollm2-135m-instruct"
RESULTS, PAGE = Path("benchmarks/results/compression.jsonl"), Path("docs/results/compression.md")
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
TRAIN_ROWS, HELD_ROWS, GSM_HELD = 500, 100, 200  # of each of the three kinds of text
RATIOS = (0.5, 0.6, 0.7, 0.8, 0.9)
HEAL = {"method": "heal", "train": {"epochs": 1, "batch_size": 16, "learning_rate": 5e-4}}
DISTIL = {"method": "distil", "deltas": [{"method": "lora", "rank": 16, "alpha": 32}],  # all weights in fp32 take an hour here
          "train": {"max_steps": 40, "batch_size": 16, "learning_rate": 5e-4}}
Steps = list[dict[str, Any]]


def catalogue() -> dict[str, dict[str, Steps]]:
    """Stage -> name -> steps."""
    drops = {f"drop-{choose}-{ratio}": [{"method": "drop-layers", "ratio": ratio, "choose": choose}]
             for ratio in (0.8, 0.6) for choose in ("uniform", "block-influence", "cluster")}
    lowrank = {f"{method}-{ratio}": [{"method": method, "ratio": ratio}]
               for method in ("svd", "whitened-svd", "shared-basis") for ratio in RATIOS}
    neurons = [{"method": "prune-neurons", "share": 0.2}]
    narrow = [*neurons, {"method": "prune-heads", "share": 0.3}]
    repair = {f"{name}{suffix}": [*steps, *more]
              for name, steps in (("drop-0.8", drops["drop-block-influence-0.8"]),
                                  ("drop-0.6", drops["drop-block-influence-0.6"]),
                                  ("whitened-svd-0.7", lowrank["whitened-svd-0.7"]), ("neurons-0.2", neurons))
              for suffix, more in (("", []), ("+heal", [HEAL]), ("+distil", [DISTIL]), ("+distil+heal", [DISTIL, HEAL]))}
    return {
        "lowrank": lowrank,
        "zeros": {f"{method}-{sparsity}": [{"method": method, "sparsity": sparsity}]
                  for sparsity in (0.5, "2:4") for method in ("magnitude", "wanda")},
        "layers": drops,
        "repair": repair,
        "speed": {"drop-0.8": drops["drop-block-influence-0.8"], "neurons-0.2": neurons, "neurons-and-heads": narrow,
                  "whitened-svd-0.5": lowrank["whitened-svd-0.5"]},
        "quantise": {"int8": [{"method": "quantise", "codec": "int8"}], "nf4": [{"method": "quantise", "codec": "nf4"}],
                     "int4": [{"method": "quantise", "codec": "int4"}], "gptq": [{"method": "gptq"}],
                     "nf4+whitened-correct": [{"method": "quantise", "codec": "nf4"}, {"method": "whitened-correct"}]},
    }


# ---- text -----------------------------------------------------------------------------------------------------------

def texts(folder: Path, held: bool) -> list[list[str]]:
    """The three kinds of text: descriptions, worked sums, film reviews."""
    part = "dev" if held else "train"
    e2e = [f"Data: {row['prompt']}\nText: {row['completion']}" for row in rows_of(folder / f"e2e.{part}.jsonl")]
    sums = ["\n".join(turn["content"] for turn in row["messages"]) for row in rows_of(folder / "gsm8k.train.jsonl")]
    sst2 = [row["text"] for row in rows_of(folder / f"sst2.{part}.jsonl")]
    return [e2e, sums[-GSM_HELD:] if held else sums[:-GSM_HELD], sst2]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_text(data: Path, folder: Path, limit: int | None) -> None:
    """calibration.jsonl and held.jsonl, the kinds in turns; no held-out row is a calibration row."""
    known = {text for kind in texts(data, False) for text in kind}
    for name, held, most in (("calibration", False, TRAIN_ROWS), ("held", True, HELD_ROWS)):
        kinds = [[text for text in kind if not held or text not in known][:limit or most] for kind in texts(data, held)]
        lines = [json.dumps({"text": text}) for row in zip(*kinds, strict=False) for text in row]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---- runs -----------------------------------------------------------------------------------------------------------

def perform(name: str, stage: str, steps: Steps, data: Path, limit: int | None, precision: str) -> dict[str, Any]:
    """One compression; a failure is no line, so that it is tried again at the next start."""
    record: dict[str, Any] = {"stage": stage, "name": name, "steps": steps, "limit": limit, "precision": precision}
    began = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            write_text(data, place, limit)
            run = {"model": MODEL, "task": "causal-lm", "compress": steps, "precision": precision, "output": str(place / "out"),
                   "data": {"train": str(place / "calibration.jsonl"), "eval": str(place / "held.jsonl"), "max_length": 256}}
            found = compress(parse_compress(run, base=Path.cwd()), say=lambda text: None)
    except Exception:
        return record | {"failed": traceback.format_exc()}  # for the terminal: it names places of one machine
    kept = ("metrics", "base_metrics", "intervals", "bytes_before", "bytes_after", "parameters_before", "parameters_after",
            "predicted_bytes", "time", "rows", "notes", "versions", "fingerprint")
    return record | {key: found[key] for key in kept} | {"wall_seconds": time.perf_counter() - began}


def done_of(path: Path) -> dict[tuple[str, str, int | None, str], dict[str, Any]]:
    """The finished lines by stage, name, limit and precision, of the steps that the catalogue has now."""
    now = catalogue()
    return {(line["stage"], line["name"], line["limit"], line["precision"]): line for line in read_lines(path)
            if "failed" not in line and now.get(line["stage"], {}).get(line["name"]) == line["steps"]}


def run_stage(given: argparse.Namespace) -> int:
    """Everything of the stage that is not done; gives back how many failed."""
    failed = 0
    done = done_of(given.results)
    for name, steps in catalogue()[given.stage].items():
        if (given.only and name not in given.only) or (given.stage, name, given.limit, given.precision) in done:
            continue
        record = perform(name, given.stage, steps, given.data, given.limit, given.precision)
        if "failed" in record:
            failed += 1
            print(f"{given.stage} {name}: {record['failed']}", file=sys.stderr, flush=True)
            continue
        append(given.results, record)
        said = (
            f"perplexity {record['metrics']['perplexity']:.4g} (was {record['base_metrics']['perplexity']:.4g}), "
            f"{record['bytes_after'] / record['bytes_before']:.1%} of the bytes, {record['time']['speedup']:.2f} times as fast")
        print(f"{given.stage} {name}: {said}", flush=True)
    return failed


# ---- report ---------------------------------------------------------------------------------------------------------

def report(results: Path, page: Path, limit: int | None) -> None:
    """The tables and what they say of each claim, between the page's markers."""
    lines: dict[tuple[str, str], dict[str, Any]] = {
        (stage, name): line for (stage, name, rows, _), line in done_of(results).items() if rows == limit}
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{page} needs the markers {BEGIN} and {END}, once each")
    parts = [claims(lines)]
    for stage in catalogue():
        found = [line for (where, _), line in lines.items() if where == stage]
        if found:
            parts.append(table(stage, found))
    head, rest = text.split(BEGIN)
    page.write_text(head + BEGIN + "\n" + "\n\n".join(parts) + "\n" + END + rest.split(END)[1], encoding="utf-8")


def table(stage: str, lines: list[dict[str, Any]]) -> str:
    first = lines[0]
    rows = [f"| {line['name']} | {loss(line):.4f} | {low:.4f} to {high:.4f} | {line['metrics']['perplexity']:.4g} | "
            f"{line['bytes_after'] / line['bytes_before']:.1%} | {line['parameters_after'] / line['parameters_before']:.1%} | "
            f"{line['time']['speedup']:.2f} |" for line in lines for low, high in [line["intervals"]["loss"]]]
    return "\n".join([
        f"### {stage}", "", f"{first['rows']['held_out']} held-out rows; before: loss {first['base_metrics']['loss']:.4f}, "
        f"perplexity {first['base_metrics']['perplexity']:.4g}; {first['precision']} weights.", "",
        "| steps | loss | 95% interval | perplexity | bytes | parameters | times as fast |",
        "|---|---|---|---|---|---|---|", *rows])


def loss(line: dict[str, Any]) -> float:
    return float(line["metrics"]["loss"])


def claims(lines: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Each claim with the figures that decide it; one that was not measured says so."""
    found = []

    def less(claim: str, better: tuple[str, str], than: tuple[str, str]) -> None:
        if better in lines and than in lines:
            a, b = loss(lines[better]), loss(lines[than])
            found.append(f"| {claim} | {'yes' if a < b else '**no**'} | {a:.4f} against {b:.4f} |")
        else:
            found.append(f"| {claim} | not measured | |")

    for ratio in RATIOS:
        less(f"whitened beats plain SVD at {ratio}", ("lowrank", f"whitened-svd-{ratio}"), ("lowrank", f"svd-{ratio}"))
    less("Wanda beats magnitude at 50%", ("zeros", "wanda-0.5"), ("zeros", "magnitude-0.5"))
    for ratio in (0.8, 0.6):
        for choose in ("block-influence", "cluster"):
            less(f"{choose} beats uniform dropping, {ratio} of the blocks kept", ("layers", f"drop-{choose}-{ratio}"),
                 ("layers", f"drop-uniform-{ratio}"))
    for name in ("drop-0.8", "drop-0.6", "whitened-svd-0.7", "neurons-0.2"):
        for suffix in ("+heal", "+distil"):
            less(f"{suffix[1:]} improves {name}", ("repair", name + suffix), ("repair", name))
        less(f"healing improves distilled {name}", ("repair", name + "+distil+heal"), ("repair", name + "+distil"))
    less("GPTQ beats rounding to int4", ("quantise", "gptq"), ("quantise", "int4"))
    for name in ("drop-0.8", "neurons-and-heads"):
        line = lines.get(("speed", name))
        speedup = line["time"]["speedup"] if line is not None else None
        holds = "not measured | |" if speedup is None else f"{'yes' if speedup >= 1.15 else '**no**'} | {speedup:.2f} |"
        found.append(f"| {name} generates at least 1.15 times as fast | {holds}")
    return "\n".join(["### Claims", "", "| claim | holds | held-out loss, or times as fast |", "|---|---|---|", *found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*catalogue(), "report"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--limit", type=int, help="rows of each kind of text, for a trial")
    parser.add_argument("--only", nargs="+", help="names of the stage")
    parser.add_argument("--precision", default="auto", choices=("stored", "auto", "fp32", "bf16"))
    given = parser.parse_args()
    try:
        if given.stage == "report":
            report(given.results, given.page, given.limit)
            return
        if given.data is None:
            parser.error("--data DIR is needed")
        given.results.parent.mkdir(parents=True, exist_ok=True)
        failed = run_stage(given)
    except DeltaloomError as error:
        sys.exit(str(error))
    if failed:
        sys.exit(f"{given.stage}: {failed} failed; run the command again to try them again")


if __name__ == "__main__":
    main()
