"""The bars of private tuning on two real tasks: two parties with unequal rows of unlike kinds, guards off and on, over gRPC.

    python benchmarks/private_bars.py rated|e2e --data DIR [--guard gaussian --noise 1] [--scale 0.5]
    python benchmarks/private_bars.py report          # the tables of docs/results/private.md

`rated`: bundled:minilm says negative, neutral or positive (rating below -0.5, between, above 0.5) of sentences on films (one
party) and on products (the other); 80/10/10 by seed 0, figures on the second part, the third is not looked at. `e2e`: SmolLM2
writes a text for restaurant data; one party has the shorter records, the other the longer ones. Labels stay at home; the emulator
keeps the front, the last blocks and some between; for e2e those are chosen by block influence and distilled on public text that
neither party has (gsm8k, SST-2).
The back answers over mutual TLS on loopback, in this process; `private-demo` shows the same with processes. Guards: every row is
clipped at the 99% quantile of the norms at the cut and gets noise of `--noise` times the root mean square of an activation.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from evidence.runs import append, read_lines
from transformers import PreTrainedModel

from deltaloom import attention
from deltaloom.data.encode import Example
from deltaloom.data.read import Rows, read_rows
from deltaloom.data.settings import DataSettings
from deltaloom.deltas.prefix import Prefix
from deltaloom.errors import DeltaloomError
from deltaloom.evaluate.base import task_named
from deltaloom.jobs.compress import compress
from deltaloom.jobs.compressfile import parse_compress
from deltaloom.jobs.prepare import head_methods
from deltaloom.models import LoadedModel, load_model
from deltaloom.private.authority import Authority
from deltaloom.private.back import Back
from deltaloom.private.bars import BarSettings, Comparison, Held, measure
from deltaloom.private.client import GrpcChannel, join
from deltaloom.private.cut import split
from deltaloom.private.guards._noise import new_key
from deltaloom.private.guards.base import Chain
from deltaloom.private.guards.gaussian import Gaussian
from deltaloom.private.means.even import Even
from deltaloom.private.membership import Membership, read_invite
from deltaloom.private.policy import Policy, write_policy
from deltaloom.private.replay import packed, run_front
from deltaloom.private.service import Service
from deltaloom.private.wire.convert import Hello
from deltaloom.train.settings import TrainSettings

RESULTS, PAGE = Path("benchmarks/results/private_bars.jsonl"), Path("docs/results/private.md")
BEGIN, END = "<!-- bars: begin -->", "<!-- bars: end -->"
MEAN = Even()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEMPLATE = "Data: {prompt}\nText:"
TASKS: dict[str, dict[str, Any]] = {
    "rated": {"model": "bundled:minilm", "task": "sequence-classification", "cut": 2, "keep_last": 1, "middle": 1,
              "data": {"max_length": 64}, "prefix": 16, "rate": 5e-3, "batch": 32, "epochs": 3.0, "rounds": 12,
              "passes": 6.0, "primary": "accuracy", "precision": "fp32"},
    "e2e": {"model": "bundled:smollm2-135m-instruct", "task": "causal-lm", "cut": 2, "keep_last": 2, "middle": 20,
            "data": {"max_length": 128, "template": TEMPLATE}, "prefix": 16, "rate": 5e-3, "batch": 16, "epochs": 2.0,
            "rounds": 8, "passes": 4.0, "primary": "loss", "precision": "bf16"},
}


# ---- rows -----------------------------------------------------------------------------------------------------------

def split_rated(data: Path, folder: Path, scale: float) -> None:
    """Classes of ratings, 80/10/10 by seed 0; films' and products' training and dev rows."""
    for party in ("movies", "products"):
        lines = [json.loads(line) for line in (data / f"rated.{party}.jsonl").read_text(encoding="utf-8").splitlines()]
        random.Random(0).shuffle(lines)
        rows = [{"text": row["text"], "label": label_of(row["rating"])} for row in lines]
        train, dev = rows[:int(0.8 * len(rows))], rows[int(0.8 * len(rows)):int(0.9 * len(rows))]
        write(folder / f"{party}.train.jsonl", train[:int(scale * len(train) / 2)])
        write(folder / f"{party}.dev.jsonl", dev[:int(max(0.3, scale) * len(dev))])


def label_of(rating: float) -> str:
    return "positive" if rating > 0.5 else "negative" if rating < -0.5 else "neutral"


def split_e2e(data: Path, folder: Path, scale: float) -> None:
    """Records with up to four fields, and longer ones, which are fewer here."""
    for part, counts in (("train", (480, 160)), ("dev", (80, 80))):
        lines = [json.loads(line) for line in (data / f"e2e.{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        kinds = {"short": [row for row in lines if row["prompt"].count("[") <= 4],
                 "long": [row for row in lines if row["prompt"].count("[") >= 6]}
        for (party, rows), count in zip(kinds.items(), counts, strict=True):
            write(folder / f"{party}.{part}.jsonl", rows[:int(scale * count)])
    public = [{"prompt": "", "completion": "\n".join(turn["content"] for turn in json.loads(line)["messages"])}
              for line in (data / "gsm8k.train.jsonl").read_text(encoding="utf-8").splitlines()[:int(scale * 240)]]
    public += [{"prompt": "", "completion": json.loads(line)["text"]}
               for line in (data / "sst2.train.jsonl").read_text(encoding="utf-8").splitlines()[:int(scale * 240)]]
    write(folder / "public.jsonl", [{"text": row["completion"]} for row in public])


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")


# ---- the owner on loopback ------------------------------------------------------------------------------------------

class Loopback:
    """One owner's service for each back, and the channels of its parties."""

    def __init__(self, folder: Path, cut: int, stack: ExitStack) -> None:
        self.folder, self.cut, self.stack = folder, cut, stack
        self._services: dict[int, tuple[Service, Authority]] = {}

    def __call__(self, party: str, back: Back) -> GrpcChannel:
        """A party's channel to a back, whose service is started when the first one asks."""
        if id(back) not in self._services:
            self._services[id(back)] = self._serve(back)
        service, authority = self._services[id(back)]
        place = self.folder / f"{len(self._services)}-{party}"
        place.parent.mkdir(exist_ok=True)
        path = place.with_suffix(".invite")
        path.touch(mode=0o600)
        path.write_text(json.dumps(authority.invite(party, service.address).as_dict()))
        invite = read_invite(path)
        member = Membership.prepare(place, invite)
        join(member, invite.key.encode(), invite.certificate.encode(), patience=10)
        return GrpcChannel(member, Hello(run="bars", purpose="training", package="benchmark", codec="bf16", cut=self.cut,
                                         method="prefix", guards=[], labels="home", fingerprint=back.facts.fingerprint))

    def _serve(self, back: Back) -> tuple[Service, Authority]:
        folder = self.folder / f"owner-{len(self._services)}"
        authority = Authority.create(folder, "owner")
        policy = Policy(cut=self.cut)
        write_policy(folder / "policy.yaml", policy)
        service = Service(folder, back, listen="127.0.0.1:0", policy=policy)
        service.start()
        self.stack.callback(service.stop, grace=2)
        return service, authority


# ---- one measurement ------------------------------------------------------------------------------------------------

def perform(name: str, data: Path, guard: str, noise: float, scale: float, seed: int) -> dict[str, Any]:
    wanted, began = TASKS[name], time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        (split_rated if name == "rated" else split_e2e)(data, folder, scale)
        parties = sorted({path.name.split(".")[0] for path in folder.glob("*.train.jsonl")})
        small = emulator(wanted, folder)
        kind = task_named(wanted["task"])
        read = {part: {party: rows_of(folder / f"{party}.{part}.jsonl", wanted, kind) for party in parties}
                for part in ("train", "dev")}
        everything = [row for rows in read["train"].values() for row in rows.rows]
        targets = kind.prepare(settings_of(wanted), everything, [row for rows in read["dev"].values() for row in rows.rows])
        labels = list(targets.labels.names) if targets.labels else None
        whole = load_model(wanted["model"], task=kind.name, labels=labels, dtype=DTYPES[wanted["precision"]])
        little = load_model(str(small), task=kind.name, labels=labels, dtype=DTYPES[wanted["precision"]])
        for loaded in (whole, little):
            attention.install(loaded.model)
        task = kind(settings_of(wanted), targets, whole.model.config, tokenizer=whole.tokenizer)
        encoded = {party: task.encode(rows.rows) for party, rows in read["train"].items()}
        method = Prefix(length=wanted["prefix"])
        guards, facts = guards_of(guard, noise, whole, wanted, encoded)
        found = measure(whole.model, little.model, Comparison(
            task, encoded, {party: Held(task.encode(rows.rows), rows.rows) for party, rows in read["dev"].items()}, [method],
            settings(wanted, seed), head_methods(whole, [method]), MEAN, guards=guards,
            connect=Loopback(folder / "wire", wanted["cut"], stack), say=lambda text: print(text, flush=True)))
    return {"task": name, "guard": guard, "mean": MEAN.name, "noise": facts, "scale": scale, "seed": seed, "bars": found.bars,
            "parties": found.parties, "settings": {key: value for key, value in wanted.items() if key != "data"},
            "wall_seconds": time.perf_counter() - began}


def settings(wanted: dict[str, Any], seed: int) -> BarSettings:
    common = {"batch_size": wanted["batch"], "learning_rate": wanted["rate"], "precision": wanted["precision"],
              "schedule": "constant", "eval_every": None}
    # A round averages what parties that train side by side moved: a pass of both is worth half a pass of all rows in one place,
    # and the larger party has moved further by itself, so that each counts the same.
    each = TrainSettings(**common, epochs=wanted["passes"] / wanted["rounds"])
    return BarSettings(cut=wanted["cut"], head="party", labels="home", rounds=wanted["rounds"], seed=seed,
                       emulate=TrainSettings(**common, epochs=1.0), tune=each,
                       central=TrainSettings(**common, epochs=wanted["epochs"]))


def emulator(wanted: dict[str, Any], folder: Path) -> Path:
    steps: list[dict[str, Any]] = [{"method": "emulator", "keep_first": wanted["cut"], "keep_last": wanted["keep_last"],
                                    "middle": wanted["middle"]}]
    public = folder / "public.jsonl"
    run: dict[str, Any] = {"model": wanted["model"], "compress": steps, "output": str(folder / "emulator"),
                           "task": wanted["task"]}
    if public.exists():
        steps[0]["choose"] = "block-influence"
        steps.append({"method": "distil", "loss": "offsite", "keep_last": wanted["keep_last"],
                      "train": {"epochs": 1, "batch_size": 16, "learning_rate": 1e-4}})
        run["data"] = {"train": str(public), "max_length": 128}
    compress(parse_compress(run, base=Path.cwd()), say=lambda text: None)
    return folder / "emulator"


def settings_of(wanted: dict[str, Any]) -> DataSettings:
    return DataSettings(train="rows.jsonl", **wanted["data"])


def rows_of(path: Path, wanted: dict[str, Any], kind: Any) -> Rows:
    return read_rows([str(path)], settings_of(wanted), Path.cwd(), accepts=kind.formats, numbers=kind.numbers)


def guards_of(guard: str, noise: float, loaded: LoadedModel, wanted: dict[str, Any],
              encoded: dict[str, list[Example]]) -> tuple[dict[str, list[Chain]] | None, dict[str, Any] | None]:
    """Noise in units of what the model makes at the cut of some training rows, which parties could measure on any text."""
    if guard == "off":
        return None, None
    rows = [row.input_ids for examples in encoded.values() for row in examples[:32]]
    hidden = at_cut(loaded.model, rows, wanted)
    clip, size = float(hidden.norm(dim=1).quantile(0.99)), float(hidden.pow(2).mean().sqrt())
    made = Gaussian(norm=clip, sigma=noise * size)
    facts = {"multiple": noise, "norm": clip, "sigma": noise * size, "mu_per_row": 2 * clip / (noise * size)}
    return {party: [Chain([made], new_key())] for party in encoded}, facts


@torch.no_grad()
def at_cut(model: PreTrainedModel, rows: Sequence[Sequence[int]], wanted: dict[str, Any]) -> torch.Tensor:
    """(tokens, d_model) hidden states behind the front."""
    front, _ = split(model, wanted["task"], wanted["cut"], head="party")
    found = []
    for row in rows:
        ids = torch.tensor([list(row)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found.append(packed(run_front(front.model, inputs, front.is_decoder), "masked", (len(row),)))
    return torch.cat(found)


# ---- report ---------------------------------------------------------------------------------------------------------

def report(results: Path, page: Path) -> None:
    """The tables between the page's markers."""
    parts = []
    for line in sorted(read_lines(results), key=lambda line: line.get("mean") != MEAN.name):
        kind = TASKS[line["task"]]["primary"]
        sets = list(next(iter(line["bars"].values())))
        counts = ", ".join(f"{facts['rows']:,} {party}" for party, facts in line["parties"].items())
        guard = "guards off" if line["guard"] == "off" else f"noise of {line['noise']['multiple']} times an activation"
        told = line["settings"]
        mean = "each party counting the same" if line.get("mean") == MEAN.name else "parties weighed by rows"
        parts += [f"### {line['task']}, {guard}, {mean}", "", f"Training rows: {counts}; {kind} on held-out rows of each kind. "
                  f"Split tuning: {told['passes']:g} passes of each party over its rows in {told['rounds']} rounds; in one place "
                  f"{told['epochs']:g} passes over all rows.", "",
                  f"| bar | {' | '.join(sets)} | mean |", "|---|" + "---|" * (len(sets) + 1)]
        for bar, scores in line["bars"].items():
            values = [scores[each][kind] for each in sets]
            mean = math.fsum(values) / len(values)
            parts.append(f"| {bar} | " + " | ".join(f"{value:.4f}" for value in [*values, mean]) + " |")
        parts.append("")
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{page} needs the markers {BEGIN} and {END}, once each")
    page.write_text(text.split(BEGIN)[0] + BEGIN + "\n" + "\n".join(parts) + END + text.split(END)[1], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*TASKS, "report"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--guard", choices=("off", "gaussian"), default="off")
    parser.add_argument("--noise", type=float, default=1.0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the rows, for a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    try:
        if given.stage == "report":
            report(given.results, given.page)
            return
        if given.data is None:
            parser.error("--data DIR is needed")
        given.results.parent.mkdir(parents=True, exist_ok=True)
        append(given.results, perform(given.stage, given.data, given.guard, given.noise, given.scale, given.seed))
    except DeltaloomError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
