"""Runs commands in several processes as torchrun would: `python -m tests.cli.in_processes DIR`.

`DIR/commands.json` is a list of [name, number of processes, arguments]. What each process prints goes to
`DIR/NAME-NUMBER.out` and `.err`, the exit codes to `DIR/NAME.codes`. All are forked from one process, because to load everything
takes seconds.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import deltaloom.jobs.tune  # noqa: F401 (before the processes are forked)
from deltaloom.cli.main import main
from tests.train.teamwork import in_processes


def command(place: Path, name: str, arguments: list[str]) -> None:
    for number, ending in ((1, "out"), (2, "err")):
        file = os.open(place / f"{name}-{os.environ['RANK']}.{ending}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, number)
    main(arguments)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for label, size, given in json.loads((folder / "commands.json").read_text()):
        codes = in_processes(size, lambda label=label, given=given: command(folder, label, given), 120)
        (folder / f"{label}.codes").write_text(json.dumps(codes))
