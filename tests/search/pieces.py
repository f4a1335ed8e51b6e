"""What the tests of searches share: a toy study whose trials cost nothing, also as a process of its own. Nothing of torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltaloom.search.outcome import Objective
from deltaloom.search.settings import SearchSettings
from deltaloom.search.space import parse_space
from deltaloom.search.study import Asked, Study, open_study
from deltaloom.search.workers import Slot

ROOT = Path(__file__).parents[2]
LOSS, SIZE = Objective("loss", False), Objective("parameters", False)
TEMPLATE: dict[str, Any] = {"model": "toy", "data": {"train": "a"}, "train": {"learning_rate": {"log": [1e-4, 1e-1]}},
                            "deltas": {"choice": [[{"method": "lora", "rank": {"int": [1, 8]}}], [{"method": "bitfit"}]]}}


@contextmanager
def interrupted_at(number: int, monkeypatch: Any) -> Iterator[None]:
    """Within the block the process gets a SIGTERM when that trial tells of an evaluation."""
    told = Asked.told

    def interrupt(self: Asked, value: float) -> bool:
        if self.number == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return told(self, value)

    with monkeypatch.context() as patch:
        patch.setattr(Asked, "told", interrupt)
        yield


def toy_study(folder: Path, *, objectives: tuple[Objective, ...] = (LOSS,), template: dict[str, Any] | None = None,
              resume: bool = False, slot: Slot | None = None, **settings: Any) -> Study:
    space = parse_space(template or TEMPLATE)
    own = SearchSettings(**{"trials": 8, "pruner": "none", "seed": 3} | settings)
    return open_study(own.storage or str(folder / "journal.log"), own.name or "toy", space=space, settings=own,
                      objectives=objectives, identity={"space": space.described()}, seed=own.seed or 0,
                      slot=slot or Slot.take(folder), resume=resume)


def cost(parameters: dict[str, Any]) -> float:
    """Something to make low."""
    return abs(parameters["train.learning_rate"] - 0.01) + (0.0 if parameters["deltas"] == "lora" else 0.5)


def finish(study: Study) -> None:
    """Do all trials that are left."""
    study.take_back()
    while (asked := study.next()) is not None:
        asked.complete([cost(asked.parameters)], {"loss": cost(asked.parameters)}, {}, 0.0)


def start_worker(folder: Path, trials: int, pause: float) -> subprocess.Popen[str]:
    """A worker in a process of its own; it tells each trial when it begins and when it is done."""
    code = ("import sys, pathlib; from tests.search.pieces import work_here; "
            "work_here(pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))")
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen([sys.executable, "-c", code, str(folder), str(trials), str(pause)], stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": path})


def work_here(folder: Path, trials: int, pause: float) -> None:
    study = toy_study(folder, trials=trials, resume=True)
    study.take_back()
    while (asked := study.next()) is not None:
        print("begun", asked.number, flush=True)
        time.sleep(pause)
        asked.complete([cost(asked.parameters)], {"loss": cost(asked.parameters)}, {}, pause)
        print("done", asked.number, flush=True)
