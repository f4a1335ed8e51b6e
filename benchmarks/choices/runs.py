"""One run of a comparison, and how a candidate's rate is chosen: on rows that neither train nor score."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evidence.runs import KEPT, Job, key_of, silence

import deltaloom
from deltaloom.errors import NonFiniteError
from deltaloom.jobs.evaluate import evaluate
from deltaloom.jobs.predict import predict

HELD = 500                        # rows on which rates are chosen
LENGTHS = (10, 20, 30)            # words: bounds between short and long inputs
PRODUCTS = 2000                   # rated product sentences at most that another domain is measured on
MODEL = "bundled:minilm"
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Spec:
    """A run. `part`: `held` chooses, `dev` is told. rows None: all. `task`: sst2, or mixed (films and products)."""

    task: str
    part: str
    candidate: str
    deltas: list[dict[str, Any]]
    rows: int | None
    passes: float
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """What is the same for equal specs."""
        return key_of(asdict(self))


def trained(job: Job) -> dict[str, Any]:
    """Train and score; a run whose loss became NaN has no figures and says so."""
    spec: Spec = job.spec
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, silence():
        folder = Path(name)
        train, sets = files(spec, job.data, folder)
        try:
            made = deltaloom.tune({
                "model": MODEL, "task": "sequence-classification", "seed": spec.seed, "output": str(folder / "run"),
                "data": {"train": str(train), "max_length": 128}, "deltas": spec.deltas,
                "train": {"epochs": spec.passes, "batch_size": 16, "learning_rate": spec.rate, "precision": "bf16",
                          "save_every": None}})
        except NonFiniteError as error:
            return {"spec": asdict(spec), "diverged": str(error), "wall_seconds": time.perf_counter() - began}
        found = {"spec": asdict(spec), **{key: made[key] for key in KEPT}, "methods": made.get("methods"),
                 "sets": {name: (judged if spec.part == "held" else scored)(folder, path) for name, path in sets.items()}}
    return {**found, "wall_seconds": time.perf_counter() - began}


def judged(folder: Path, path: Path) -> dict[str, Any]:
    """Metrics on a file, the loss among them."""
    return evaluate(str(folder / "run"), [path], say=lambda text: None)["metrics"]


def scored(folder: Path, path: Path) -> dict[str, Any]:
    """Accuracy on a file, and [right, rows] of its inputs by their length in words."""
    out = folder / f"{path.stem}.predicted.jsonl"
    predict(str(folder / "run"), [path], out, say=lambda text: None)
    bins: dict[str, list[int]] = {}
    for row, answer in zip(lines_of(path), lines_of(out), strict=True):
        words = len(row["text"].split())
        place = bins.setdefault(next((f"to {bound}" for bound in LENGTHS if words <= bound), f"over {LENGTHS[-1]}"), [0, 0])
        place[0] += row["label"] == answer["label"]
        place[1] += 1
    right, total = (sum(each[place] for each in bins.values()) for place in (0, 1))
    return {"accuracy": right / total, "rows": total, "lengths": bins}


def files(spec: Spec, data: Path, folder: Path) -> tuple[Path, dict[str, Path]]:
    """The training file and those that are scored, by name. Training rows are drawn by the seed; held rows never are."""
    pools, sets = (sst2 if spec.task == "sst2" else mixed)(data)
    rng = random.Random(spec.seed)
    train: Lines = []
    held: dict[str, Lines] = {}
    for name, rows in pools.items():
        rows = list(rows)
        random.Random(0).shuffle(rows)
        held[name], rest = rows[:HELD], rows[HELD:]
        rng.shuffle(rest)
        train += rest[:spec.rows]
    chosen = held if spec.part == "held" else sets
    return (written(folder / "train.jsonl", train),
            {name: written(folder / f"{name}.jsonl", rows) for name, rows in chosen.items()})


def sst2(data: Path) -> tuple[dict[str, Lines], dict[str, Lines]]:
    """SST-2: what is trained on, its dev rows, and rated sentences on products as another domain."""
    products = [{"text": row["text"], "label": "positive" if row["rating"] > 0 else "negative"}
                for row in lines_of(data / "rated.products.jsonl") if abs(row["rating"]) > 0.5][:PRODUCTS]
    return {"sst2": lines_of(data / "sst2.train.jsonl")}, {"sst2": lines_of(data / "sst2.dev.jsonl"), "products": products}


def mixed(data: Path) -> tuple[dict[str, Lines], dict[str, Lines]]:
    """Films and products in three classes, 80/10/10 by seed 0; the last tenth is not looked at. As many of each."""
    train, dev = {}, {}
    for name in ("movies", "products"):
        rows = [{"text": row["text"], "label": label_of(row["rating"])} for row in lines_of(data / f"rated.{name}.jsonl")]
        random.Random(0).shuffle(rows)
        train[name], dev[name] = rows[:int(0.8 * len(rows))], rows[int(0.8 * len(rows)):int(0.9 * len(rows))]
    return train, dev


def label_of(rating: float) -> str:
    """Sentiment classes of a rating from -4 to 4."""
    return "positive" if rating > 0.5 else "negative" if rating < -0.5 else "neutral"


def lines_of(path: Path) -> Lines:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def written(path: Path, rows: Lines) -> Path:
    """The file with these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- choosing -------------------------------------------------------------------------------------------------------

def mean_of(record: dict[str, Any], metric: str) -> float | None:
    """The mean of a metric over the sets of a record; None for a run that diverged."""
    return None if "sets" not in record else sum(each[metric] for each in record["sets"].values()) / len(record["sets"])


def best_rate(records: Iterable[dict[str, Any]], candidate: str) -> float | None:
    """The rate with the lowest loss on held rows; None where all diverged."""
    tried = [record for record in records if record["spec"]["candidate"] == candidate and record["spec"]["part"] == "held"]
    whole: Sequence[dict[str, Any]] = [record for record in tried if "sets" in record]
    return min(whole, key=lambda record: mean_of(record, "loss") or 0.0)["spec"]["rate"] if whole else None


def line_of(record: dict[str, Any]) -> str:
    """A record for the terminal."""
    spec = record["spec"]
    what = f"{spec['task']} {spec['candidate']} {spec['part']} rows {spec['rows']} rate {spec['rate']:g} seed {spec['seed']}: "
    if "failed" in record:
        return what + "FAILED\n" + record["failed"]
    if "sets" not in record:
        return what + "diverged"
    return what + ", ".join(f"{name} {each['accuracy']:.4f}" for name, each in record["sets"].items()) + (
        f", {record['final_parameters']:,} parameters")
