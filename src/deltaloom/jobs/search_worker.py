"""A further worker of a search: a process that is told on its standard input what to do. `jobs.search` starts it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from deltaloom.errors import DeltaloomError, Interrupted
from deltaloom.jobs.search import open_search, work
from deltaloom.jobs.searchfile import SearchRun
from deltaloom.jobs.trial import Bench, silent
from deltaloom.search.outcome import Objective
from deltaloom.search.proposers import need_optuna
from deltaloom.search.settings import SearchSettings
from deltaloom.search.space import parse_space
from deltaloom.search.workers import Slot


def main() -> int:
    """Work until the budget is spent; the exit code of the command line."""
    task = json.loads(sys.stdin.read())
    settings = SearchSettings.parse(task["search"], "search")
    run = SearchRun(settings, parse_space(task["template"]), Path(task["base"]), task["name"])
    objectives = tuple(Objective(name, higher) for name, higher in task["objectives"])
    need_optuna()
    slot = Slot.take(run.folder)
    try:
        study = open_search(run, objectives, slot, resume=True)
        work(run, study, Bench(run.settings.bounds, silent), _say)
    except Interrupted:
        return Interrupted.exit_code
    except DeltaloomError as error:
        _say(f"worker {slot.number}: {error}")
        return error.exit_code
    finally:
        slot.close()
    return 0


def _say(text: str = "") -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
