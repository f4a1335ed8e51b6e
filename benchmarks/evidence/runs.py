"""One run of the evidence, and many: what is done already is skipped, each finished run is a line of STAGE.jsonl."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deltaloom
from deltaloom.errors import NonFiniteError
from deltaloom.events import read_events
from evidence.catalogue import MODELS

TEMPLATE = "Data: {prompt}\nText:"
E2E_ROWS, E2E_HELD = 1000, 200
PRIMARY = {"sst2": "accuracy", "e2e": "loss"}  # of the finals
CHOOSING = "loss"  # on rows held out of train: one row moves the accuracy on 692 of them by as much as methods differ
HIGHER = {"accuracy": True, "loss": False}
KEPT = ("final_parameters", "trainable_parameters", "head_parameters", "seconds", "tokens_per_second", "peak_memory_bytes",
        "steps")


@dataclass(frozen=True)
class Spec:
    """A run: equal specs are the same run, whichever stage asks for it. `part`: `held` out of train, or `dev`."""

    task: str
    part: str
    candidate: str
    budget: str
    deltas: list[dict[str, Any]]
    rate: float
    seed: int
    limit: int | None = None  # rows, for a trial of the scripts

    @property
    def key(self) -> str:
        return key_of(asdict(self))


@dataclass(frozen=True)
class Job:
    """A spec (`Spec`, or any dataclass with a `key`) with where its data lie."""

    spec: Any
    data: Path


Train = Callable[[Job], dict[str, Any]]


# ---- one run --------------------------------------------------------------------------------------------------------

def perform(job: Job, train: Train) -> dict[str, Any]:
    """A run, or what stopped it: one candidate that fails must not end a night of runs."""
    try:
        return train(job)
    except Exception:
        return {"spec": asdict(job.spec), "failed": traceback.format_exc()}


def trained(job: Job) -> dict[str, Any]:
    """Train and evaluate; a run whose loss became NaN has no figures and says so."""
    spec = job.spec
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, silence():
        folder = Path(name)
        try:
            metrics = deltaloom.tune(run_file(spec, job.data, folder), overwrite=True)
        except NonFiniteError as error:
            return {"spec": asdict(spec), "diverged": str(error), "wall_seconds": time.perf_counter() - began}
        found = {"spec": asdict(spec), **metrics["metrics"], **{key: metrics[key] for key in KEPT},
                 "ranks": last_ranks(folder / "run")}
        if spec.task == "e2e" and spec.part == "dev":
            found["bleu"] = bleu(folder, job.data, spec.limit)
    return {**found, "wall_seconds": time.perf_counter() - began}


def run_file(spec: Spec, data: Path, folder: Path) -> dict[str, Any]:
    """The mapping that `deltaloom.tune` takes."""
    model, task = MODELS[spec.task]
    rows: dict[str, Any] = {"max_rows": spec.limit} if spec.limit else {}
    if spec.task == "sst2":
        rows |= {"train": str(data / "sst2.train.jsonl"), "max_length": 128}
        rows |= {"eval_fraction": 0.1} if spec.part == "held" else {"eval": str(data / "sst2.dev.jsonl")}
    else:
        train, held = e2e_files(data, folder)
        rows |= {"train": str(train), "eval": str(held if spec.part == "held" else data / "e2e.dev.jsonl"),
                 "template": TEMPLATE, "max_length": 256}
    return {"model": model, "task": task, "seed": spec.seed, "output": str(folder / "run"), "data": rows, "deltas": spec.deltas,
            "train": {"epochs": 1, "batch_size": 32 if spec.task == "sst2" else 16, "learning_rate": spec.rate,
                      "precision": "bf16", "save_every": None}}


def e2e_files(data: Path, folder: Path) -> tuple[Path, Path]:
    """The first 1,000 training rows, and rows behind them with other prompts: what rates are chosen on."""
    lines = (data / "e2e.train.jsonl").read_text(encoding="utf-8").splitlines()
    train = lines[:E2E_ROWS]
    known = {json.loads(line)["prompt"] for line in train}
    held = [line for line in lines[E2E_ROWS:] if json.loads(line)["prompt"] not in known][:E2E_HELD]
    paths = folder / "train.jsonl", folder / "held.jsonl"
    for path, part in zip(paths, (train, held), strict=True):
        path.write_text("\n".join(part) + "\n", encoding="utf-8")
    return paths


def last_ranks(folder: Path) -> dict[str, Any] | None:
    """The ranks of every group that a controller announced last; None where nothing changes ranks."""
    found = [event["ranks"] for event in read_events(folder / "events.jsonl") if event["event"] == "RankChanged"]
    return found[-1] if found else None


def bleu(folder: Path, data: Path, limit: int | None, batch: int = 20) -> dict[str, Any]:
    """BLEU of the trained delta over all prompts of dev, each against all of its references; sacrebleu's defaults."""
    import sacrebleu
    import torch

    from deltaloom import attention
    from deltaloom.generate import generate

    model, task = MODELS["e2e"]
    loaded = deltaloom.load_model(model, task=task, dtype=torch.bfloat16)
    attention.install(loaded.model)
    tuned = deltaloom.load(loaded.model, folder / "run")
    references: dict[str, list[str]] = defaultdict(list)
    for line in (data / "e2e.dev.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        references[record["prompt"]].append(record["completion"])
    prompts = list(references)[:4 if limit else None]
    texts = generate(tuned, loaded.tokenizer, [TEMPLATE.replace("{prompt}", prompt) for prompt in prompts], batch_size=batch)
    most = max(len(references[prompt]) for prompt in prompts)
    streams = [[(references[prompt] + [None] * most)[index] for prompt in prompts] for index in range(most)]
    scored = sacrebleu.corpus_bleu([text.strip() for text in texts], streams)
    return {"score": scored.score, "prompts": len(prompts), "length_ratio": scored.sys_len / max(1, scored.ref_len)}


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing of a run's own lines: many runs write at once."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ---- many runs ------------------------------------------------------------------------------------------------------

def known_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Every finished run of every stage, by its spec."""
    return {key_of(record["spec"]): record for path in sorted(folder.glob("*.jsonl")) for record in read_lines(path)
            if "spec" in record}


def key_of(spec: dict[str, Any]) -> str:
    """What is the same for equal specs."""
    return json.dumps(spec, sort_keys=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a last line that a crash cut is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def append(path: Path, record: dict[str, Any]) -> None:
    """One more line, complete or (after a crash) a cut one that the next line does not join."""
    cut = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut else "") + json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def only_one(folder: Path, stage: str) -> Iterator[None]:
    """That no second process does the same stage: its workers are started by the first."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{stage}.jsonl").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"{stage} is running already in this folder; it does not start twice (use --workers)") from None
        yield


def run_all(specs: Sequence[Any], *, folder: Path, stage: str, data: Path, workers: int, train: Train = trained,
            line: Callable[[dict[str, Any]], str] | None = None) -> dict[str, dict[str, Any]]:
    """Do what is not done yet; gives back the records of these specs by their keys, without those of runs that failed.

    Workers are processes with their share of the cores (two that share all of them would wait for each other by spinning);
    only this process writes. A failed run leaves no line, so that the next start tries it again.
    """
    known = known_records(folder)
    wanted = list({spec.key: spec for spec in specs}.values())
    waiting = [Job(spec, data) for spec in wanted if spec.key not in known]
    print(f"{stage}: {len(wanted)} runs, {len(wanted) - len(waiting)} done already", flush=True)
    if waiting:
        os.environ |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers)), "OMP_WAIT_POLICY": "PASSIVE",
                       "TOKENIZERS_PARALLELISM": "false"}
        began = time.perf_counter()
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        try:
            for number, future in enumerate(as_completed([pool.submit(perform, job, train) for job in waiting]), 1):
                record = future.result()
                if "failed" not in record:
                    append(folder / f"{stage}.jsonl", record)
                    known[key_of(record["spec"])] = record
                left = (time.perf_counter() - began) / number * (len(waiting) - number)
                print((line or line_of)(record) + f"   {number} of {len(waiting)}, about {left / 60:.0f} min left", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    return {spec.key: known[spec.key] for spec in wanted if spec.key in known}


def line_of(record: dict[str, Any]) -> str:
    """A record for the terminal."""
    spec = record["spec"]
    figure = value_of(record)
    shown = "diverged" if figure is None else f"{figure_name(spec)} {figure:.4f}, {record['final_parameters']:,} parameters"
    if "failed" in record:
        shown = "FAILED\n" + record["failed"]
    return f"{spec['task']} {spec['candidate']} {spec['budget']} rate {spec['rate']:g} seed {spec['seed']}: {shown}"


def figure_name(spec: dict[str, Any]) -> str:
    """The figure that decides in a run: one to choose by, or that of the finals."""
    return CHOOSING if spec["part"] == "held" else PRIMARY[spec["task"]]


def value_of(record: dict[str, Any]) -> float | None:
    """The figure that decides; None for a run that diverged."""
    return record.get(figure_name(record["spec"]))
