"""Training speed and memory: deltaloom against transformers' Trainer with PEFT and TRL's SFTTrainer with PEFT, in turn.

    python -m venv .venv-peers && .venv-peers/bin/pip install -c constraints.txt torch transformers peft trl
    python benchmarks/speed.py run --data DIR --peers .venv-peers/bin/python [--workloads e2e sst2 gsm8k] [--methods lora prefix]
    python benchmarks/speed.py report      # the table of docs/results/speed.md

The same tokens, batch size, rank, targets, rate and schedule on all sides; each run is a process of its own, sides take turns
(A B C A B C), and the loss on the same held-out rows says whether they did the same. Seconds are those of the training loop,
memory is the peak beyond what the process held when its model was loaded. Peers group rows by length; `trainer` has bf16
adapters, its fastest setting on a CPU, `trainer-fp32` PEFT's default, as ours are fp32. DIR holds e2e, gsm8k, sst2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deltaloom.errors import DeltaloomError
from deltaloom.jobs.estimate import matmul_rate
from deltaloom.jobs.prepare import DTYPES, Prepared, parse_parts, prepare
from deltaloom.jobs.runfile import parse_run
from deltaloom.jobs.tune import tune
from deltaloom.models import bundled_path

RESULTS, PAGE = Path("benchmarks/results/speed.jsonl"), Path("docs/results/speed.md")
BEGIN, END = "<!-- begin: speed -->", "<!-- end: speed -->"
CAUSAL = {"model": "bundled:smollm2-135m-instruct", "task": "causal-lm"}
WORKLOADS: dict[str, dict[str, Any]] = {
    "e2e": {**CAUSAL, "train": ("e2e.train.jsonl", 0, 192), "eval": ("e2e.dev.jsonl", 0, 64), "batch": 16, "rate": 1e-3,
            "data": {"template": "Data: {prompt}\nText:", "max_length": 128}},
    "gsm8k": {**CAUSAL, "train": ("gsm8k.train.jsonl", 0, 64), "eval": ("gsm8k.train.jsonl", 64, 16), "batch": 8, "rate": 1e-3,
              "data": {"max_length": 512}},
    "sst2": {"model": "bundled:minilm", "task": "sequence-classification", "train": ("sst2.train.jsonl", 0, 1600),
             "eval": ("sst2.dev.jsonl", 0, 400), "batch": 32, "rate": 1e-3, "data": {"max_length": 128}}}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"}, "adalora": {"method": "adalora", "rank": 8},
    "tsvd": {"method": "tsvd", "rank": 8}, "prefix": {"method": "prefix", "length": 16}}
PEER_METHODS = ("lora", "adalora", "prefix")
SIDES = ("deltaloom", "trainer", "trainer-fp32", "trl")


def run_values(name: str, method: str, folder: Path) -> dict[str, Any]:
    """The run file of a workload, whose rows lie in the folder."""
    chosen = WORKLOADS[name]
    return {"model": chosen["model"], "task": chosen["task"], "seed": 0, "output": str(folder / "run"),
            "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), **chosen["data"]},
            "deltas": [METHODS[method]],
            "train": {"epochs": 1, "batch_size": chosen["batch"], "learning_rate": chosen["rate"], "precision": "bf16",
                      "eval_every": 0.99, "save_every": None}}


def written(name: str, data: Path, folder: Path) -> Prepared:
    """Rows of the workload as files, and for the peers as tokens."""
    chosen = WORKLOADS[name]
    for part in ("train", "eval"):
        source, start, count = chosen[part]
        lines = (data / source).read_text(encoding="utf-8").splitlines()[start:start + count]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    run = parse_run(run_values(name, "lora", folder), base=folder)
    prepared = prepare(run, parse_parts(run), say=lambda text: None)
    as_tokens = lambda examples: [{"input_ids": e.input_ids, "labels": e.labels} for e in examples]  # noqa: E731
    (folder / "tokens.json").write_text(json.dumps({
        "model": str(bundled_path(chosen["model"].removeprefix("bundled:"))), "labels": 0 if prepared.task.generates else 2,
        "train": as_tokens(prepared.examples), "eval": as_tokens(prepared.held)}))
    return prepared


def ours(name: str, method: str, folder: Path) -> dict[str, Any]:
    """One run of the main job."""
    found = tune(parse_run(run_values(name, method, folder), base=folder), overwrite=True, say=lambda text: None)
    return {"seconds": found["seconds"], "tokens": found["tokens"], "peak_bytes": found["peak_memory_bytes"],
            "loss": found["metrics"]["loss"], "flops_per_token": found["flops_per_token"]}


def measure(given: argparse.Namespace) -> None:
    """Every wanted pair, a line each as soon as it is measured."""
    for name in given.workloads:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            written(name, given.data, folder)
            for number in range(given.rounds):
                rate = matmul_rate(DTYPES["bf16"], seconds=1.0)
                for method in given.methods:
                    for side in given.sides:
                        if side != "deltaloom" and (method not in PEER_METHODS or (side == "trl" and name == "sst2")):
                            continue
                        found = in_own_process(given, side, name, method, folder)
                        record = {"workload": name, "method": method, "side": side, "round": number, "threads": given.threads,
                                  "matmul_rate": rate, **found}
                        given.results.parent.mkdir(parents=True, exist_ok=True)
                        with given.results.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(record) + "\n")
                        print(f"{name} {method} {side}: {speed(found):.0f} tokens/s, loss {found['loss']:.3f}, "
                              f"peak {found['peak_bytes'] / 2**20:.0f} MiB", flush=True)


def in_own_process(given: argparse.Namespace, side: str, name: str, method: str, folder: Path) -> dict[str, Any]:
    """One run of a side; what it prints last is its figures."""
    python = sys.executable if side == "deltaloom" else given.peers
    script = [__file__, "one", "--workload", name, "--method", method, "--folder", str(folder)] if side == "deltaloom" else [
        str(Path(__file__).with_name("speed_peer.py")), side, method, str(folder), str(WORKLOADS[name]["batch"]),
        str(WORKLOADS[name]["rate"])]
    done = subprocess.run([str(python), *script], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(results: Path, page: Path) -> None:
    """The table between the page's markers: medians over rounds, ratios within a round."""
    records = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["workload"], record["method"], record["side"]), []).append(record)
    lines = ["| workload | method | side | tokens/s | against Trainer + PEFT | share of the rate | loss | peak, MiB | rounds |",
             "|---|---|---|---|---|---|---|---|---|"]
    for (workload, method, side), found in groups.items():
        other = groups.get((workload, method if method in PEER_METHODS else "lora", "trainer"), [])
        base = {each["round"]: each for each in other}
        ratios = [speed(each) / speed(base[each["round"]]) for each in found if each["round"] in base]
        shares = [speed(each) * each["flops_per_token"] / each["matmul_rate"] for each in found if "flops_per_token" in each]
        lines.append(f"| {workload} | {method} | {side} | {median(map(speed, found)):.0f} | {median(ratios):.2f} | "
                     f"{f'{median(shares):.2f}' if shares else '-'} | {median(each['loss'] for each in found):.3f} | "
                     f"{median(each['peak_bytes'] for each in found) / 2**20:.0f} | {len(found)} |")
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{page} needs the markers {BEGIN} and {END}, once each")
    page.write_text(text.split(BEGIN)[0] + BEGIN + "\n" + "\n".join(lines) + "\n" + END + text.split(END)[1], encoding="utf-8")


def speed(record: dict[str, Any]) -> float:
    """Real tokens a second."""
    return float(record["tokens"] / record["seconds"])


def median(values: Any) -> float:
    found = list(values)
    return statistics.median(found) if found else float("nan")


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--data", type=Path, required=True)
    run.add_argument("--peers", type=Path, default=Path(sys.executable), help="python of the environment that has the peers")
    run.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    run.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    run.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    run.add_argument("--rounds", type=int, default=5)
    run.add_argument("--results", type=Path, default=RESULTS)
    run.add_argument("--threads", type=int, default=2, help="what OMP_NUM_THREADS is, for the record")
    one = commands.add_parser("one", help="one run of ours; used by the script itself")
    one.add_argument("--workload", required=True)
    one.add_argument("--method", required=True)
    one.add_argument("--folder", type=Path, required=True)
    page = commands.add_parser("report")
    page.add_argument("--results", type=Path, default=RESULTS)
    page.add_argument("--page", type=Path, default=PAGE)
    return parser.parse_args(arguments)


def main() -> None:
    given = parsed()
    try:
        if given.command == "run":
            measure(given)
        elif given.command == "one":
            print(json.dumps(ours(given.workload, given.method, given.folder)))
        else:
            report(given.results, given.page)
    except DeltaloomError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
