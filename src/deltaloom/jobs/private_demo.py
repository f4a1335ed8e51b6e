"""Private tuning on one machine: an owner and two parties as processes of their own, and at the end what it was worth.

Every process is the ordinary command with one thread and its own folder; they talk over mutual TLS on loopback. Only the bars at
the end are measured by somebody who sees everything, which in earnest nobody does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from deltaloom.errors import DeltaloomError, SettingsError, UsageError
from deltaloom.events import finite
from deltaloom.files import check_new, write_atomic
from deltaloom.jobs import owner as owner_jobs
from deltaloom.jobs import party as party_jobs
from deltaloom.jobs.compress import compress
from deltaloom.jobs.compressfile import run_of
from deltaloom.jobs.folder import write_json
from deltaloom.jobs.leakage import leakage
from deltaloom.jobs.prepare import Parts, model_source, parse_parts
from deltaloom.jobs.private_bars import Parties, bars
from deltaloom.jobs.runfile import Run, read_yaml
from deltaloom.private.process import shared_environment
from deltaloom.private.settings import PrivateSettings, parse_private
from deltaloom.report.private import demo_page, demo_text
from deltaloom.settings import Settings
from deltaloom.train.settings import TrainSettings

COMMAND = [sys.executable, "-c", "from deltaloom.cli.main import main; main()"]
START_SECONDS, LOG_TAIL = 180.0, 1500
NO_EVALUATION: dict[str, Any] = {"eval_every": None, "early_stop": None, "metric": None, "restore_best": False,
                                 "batch_tokens": None}
Say = Callable[[str], None]


class DemoSettings(Settings):
    """The size of the demo."""

    rows: int = Field(128, ge=4, description="training rows of all parties together, the first of the run file's")
    held_out: int = Field(32, ge=1, description="held-out rows")
    shares: tuple[float, ...] = Field((0.75, 0.25), description="each party's share of the rows")
    rounds: int = Field(2, ge=1, description="joint rounds of split tuning, each of train.max_steps steps")
    keep_last: int = Field(2, ge=0, description="last blocks that the emulator keeps")
    middle: int = Field(12, ge=0, description="blocks between that the emulator keeps")
    emulate: tuple[str, ...] = Field(("train.learning_rate=0.01", "train.max_steps=12"), description="overrides of the run file "
                                     "for step 2, which is another task for the front than step 4")
    attacked: int = Field(8, ge=2, description="texts that are attacked")
    noise: tuple[float, ...] = Field((4.0,), description="noise for the leakage table, in multiples of an activation's size")
    attacks: tuple[str, ...] = Field(("nearest-embedding", "probe-table", "sequential-matching"), description="attacks; none "
                                     "named: all, which takes minutes on a real model")

    @model_validator(mode="after")
    def _shares_add_up(self) -> DemoSettings:
        if len(self.shares) < 2 or min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError("shares: at least two, above 0, adding up to 1")
        return self


def demo_settings(given: Sequence[str]) -> DemoSettings:
    """Settings from `key=value`, values as YAML.

    Raises:
        SettingsError: an unknown key or an illegal value.
    """
    values = {}
    for one in given:
        key, sign, value = one.partition("=")
        if not sign:
            raise SettingsError("a setting of the demo has the form key=value", got=one, legal=sorted(DemoSettings.model_fields))
        values[key.strip()] = read_yaml(value, f"the value of '{key}'")
    return DemoSettings.parse(values, "demo")


def private_demo(run: Run, folder: Path, demo: DemoSettings | None = None, *, say: Say = print) -> dict[str, Any]:
    """Carry the whole scheme out in a new folder; gives back bars, parties, leakage and seconds.

    Raises:
        SettingsError, DataError: the run file cannot be used. DeltaloomError: a process failed, with what it said last.
    """
    began = time.monotonic()
    demo = demo or DemoSettings()
    parts, private = parse_parts(run), parse_private(run.file.private)
    if parts.train.max_steps is None:
        raise SettingsError("the demo needs train.max_steps, which counts for each round", got=parts.train.epochs)
    check_new(folder)
    folder = folder.absolute()
    data = _split_rows(run, parts, demo, folder)
    model = model_source(run)
    with _Processes(folder, say) as processes:
        facts = _tuned(run, parts, private, demo, folder, model, data, processes, say)
    first = facts["metrics"]["a"]
    say("Measuring the bars")
    central = TrainSettings(**parts.train.given() | NO_EVALUATION | {
        "max_steps": demo.rounds * parts.train.max_steps, "batch_size": len(data) * (parts.train.rows_per_step or 16)})
    everything = Parties({name: folder / name / party_jobs.EMULATED / "delta" for name in data},
                         {name: folder / "data" / name / "train.jsonl" for name in data})
    found = bars(model, str(folder / "emulator"), parts, everything, folder / "data" / "dev.jsonl", central, cut=private.cut,
                 seed=run.file.seed, split_tuned=first["metrics"], say=say)
    leaked = leakage(folder / "a", [folder / "data" / "a" / "train.jsonl"], rows=demo.attacked, noise=demo.noise,
                     attacks=demo.attacks, without_prefix=False, say=lambda text: None)
    result = finite({"bars": found, "parties": facts["parties"], "leakage": leaked, "seconds": time.monotonic() - began,
                     "model": run.file.model, "cut": private.cut, "blocks": facts["blocks"], "held_out": demo.held_out,
                     "folder": str(folder)})
    write_json(folder / "demo.json", result)
    write_atomic(folder / "report.html", demo_page(result))
    say("\n" + demo_text(result))
    say(f"Report: {folder / 'report.html'}")
    return result


def _tuned(run: Run, parts: Parts, private: PrivateSettings, demo: DemoSettings, folder: Path, model: str,
           data: Mapping[str, int], processes: _Processes, say: Say) -> dict[str, Any]:
    """Steps 1 to 5, by the commands."""
    owner = folder / "owner"
    owner_jobs.init(owner, "owner", cut=private.cut)
    head = "party"  # labels at home cost little then: hidden states of the label positions come back, not logits
    run_files = {name: _run_file(run, folder, name) for name in data}
    more = ["--rounds", demo.rounds, "--parties-per-round", len(data), "--deltas", next(iter(run_files.values())), "--head", head,
            "--seed", run.file.seed, "--task", parts.task.name]
    say("Starting the owner; making the emulator")
    serving = processes.start("owner", "owner", "serve", owner, "--model", model, "--listen", "127.0.0.1:0", *more)
    settings = {"keep_first": str(private.cut), "keep_last": str(demo.keep_last), "middle": str(demo.middle)}
    top: dict[str, Any] = dict.fromkeys(("task", "calibration", "precision", "seed", "data"))
    made = compress(run_of(model, "emulator", settings, [], top=top | {"output": str(folder / "emulator")}, distil=None),
                    say=lambda text: None)
    address = processes.address(owner / owner_jobs.STATUS, serving)
    for name in data:
        invite = folder / f"{name}.invite"
        owner_jobs.invite(owner, name, invite, address=address)
        party_jobs.join(invite, folder / name, say=lambda text: None)
        invite.unlink()
    say("Each party tunes on the emulator")
    overrides = [part for one in demo.emulate for part in ("-s", one)]
    processes.all({name: ("party", "emulate", folder / name, path, *overrides) for name, path in run_files.items()})
    say(f"The parties tune over the cut, {demo.rounds} joint rounds of {parts.train.max_steps} steps")
    processes.all({name: ("party", "tune", folder / name, path) for name, path in run_files.items()})
    processes.stop(serving)
    metrics = {name: json.loads((folder / name / party_jobs.TUNED / "metrics.json").read_text()) for name in data}
    notes = {name: party_jobs.PartyState(folder / name / party_jobs.STATE).read(party_jobs.TUNED)["private"] for name in data}
    blocks = int(made["steps"][0]["facts"]["figures"]["blocks_before"])
    return {"metrics": metrics, "blocks": blocks,
            "parties": {name: {"rows": rows, **notes[name]} for name, rows in data.items()}}


def _split_rows(run: Run, parts: Parts, demo: DemoSettings, folder: Path) -> dict[str, int]:
    """Write each party's rows and the held-out ones; how many each party has.

    Raises:
        UsageError: the run file's rows are not in one file of JSON lines each, or too few.
    """
    lines = {}
    for key in ("train", "eval"):
        name = getattr(parts.data, key)
        path = run.base / str(name)
        if not isinstance(name, str) or path.suffix != ".jsonl" or not path.is_file():
            raise UsageError(f"the demo takes data.{key} as one file of JSON lines", got=name, legal="a .jsonl file")
        lines[key] = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows, held = lines["train"][:demo.rows], lines["eval"][:demo.held_out]
    names = [chr(ord("a") + index) for index in range(len(demo.shares))]
    bounds = [round(len(rows) * sum(demo.shares[:index])) for index in range(len(demo.shares) + 1)]
    counts = {}
    for name, start, stop in zip(names, bounds, bounds[1:], strict=False):
        own = rows[start:stop]
        if not own:
            raise UsageError("too few rows for so many parties", got=len(rows))
        _write_lines(folder / "data" / name / "train.jsonl", own)
        counts[name] = len(own)
    _write_lines(folder / "data" / "dev.jsonl", held)
    return counts


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "\n".join(lines) + "\n", mode=0o600)


def _run_file(run: Run, folder: Path, name: str) -> Path:
    """A party's run file: that of the demo, with its own rows and the emulator."""
    values = run.file.model_copy(update={"model": str(folder / "emulator"), "output": None}).as_dict()
    values["data"] = values["data"] | {"train": "train.jsonl", "eval": "../dev.jsonl"}
    return write_atomic(folder / "data" / name / "run.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


class _Processes:
    """The demo's child processes; all of them end with it."""

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder, self.say = folder, say
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._before: Any = None

    def __enter__(self) -> _Processes:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, _interrupt)  # else it would leave the children behind
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        for _, process in self._running:
            if process.poll() is None:
                process.kill()
                process.wait()

    def start(self, name: str, *arguments: object) -> subprocess.Popen[bytes]:
        """A command of its own, with one thread; what it says goes to NAME.log."""
        environment = shared_environment(dict(os.environ))
        with self._log(name).open("ab") as log:
            process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=log, stderr=log, env=environment,
                                       stdin=subprocess.DEVNULL)
        self._running.append((name, process))
        return process

    def all(self, commands: Mapping[str, Sequence[object]]) -> None:
        """Run commands side by side to their ends.

        Raises:
            DeltaloomError: one of them, or the owner, failed.
        """
        started = {name: self.start(name, *arguments) for name, arguments in commands.items()}
        while any(process.poll() is None for process in started.values()):
            self._check()
            time.sleep(0.2)
        self._check()

    def address(self, status: Path, process: subprocess.Popen[bytes]) -> str:
        """Where the owner serves, once it does."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            self._check()
            with contextlib.suppress(OSError, ValueError, KeyError):
                return str(json.loads(status.read_text(encoding="utf-8"))["address"])
            time.sleep(0.1)
        raise DeltaloomError("the owner's server did not start in time", got=self._tail("owner"))

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """An orderly end."""
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)

    def _check(self) -> None:
        for name, process in self._running:
            if process.poll() not in (None, 0):
                raise DeltaloomError(f"the process of '{name}' failed", got=f"exit code {process.returncode}",
                                     hint=f"It said last:\n{self._tail(name)}")

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _tail(self, name: str) -> str:
        return self._log(name).read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
