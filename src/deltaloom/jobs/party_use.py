"""Split inference: a party's tuned front here, the back at the owner."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaloom.checkpoint import native
from deltaloom.data.labels import LabelMap
from deltaloom.data.read import read_rows
from deltaloom.data.settings import DataSettings
from deltaloom.errors import RefusedError, SettingsError, UsageError
from deltaloom.evaluate.base import Targets, Task, task_named
from deltaloom.events import finite
from deltaloom.files import write_atomic
from deltaloom.jobs.chat import converse
from deltaloom.jobs.party import FRONT, PERSONAL, STATE, TUNED, PartyState, connect, guards_of, member
from deltaloom.jobs.runfile import Run, read_run_file
from deltaloom.private.client import GrpcChannel
from deltaloom.private.cut import Half
from deltaloom.private.decode import Writer
from deltaloom.private.front import FrontModel
from deltaloom.private.halves import load_half
from deltaloom.private.remote import RemoteBack
from deltaloom.private.settings import PrivateSettings, parse_private
from deltaloom.report.privacy import privacy_text
from deltaloom.tuned import Tuned, restore

LEFT_OUT = {"train", "eval", "eval_fraction", "max_rows", "class_weights"}  # settings that decide no row's reading


@dataclass(frozen=True)
class TunedFront:
    """What a party has after tuning: its run, its front with the deltas, and the task."""

    folder: Path
    run: Run
    settings: PrivateSettings
    front: Half
    tuned: Tuned
    task: Task
    state: PartyState


def open_front(folder: Path, *, personal: bool | None = None) -> TunedFront:
    """The tuned front of a party; `personal` None takes the personal delta if there is one.

    Raises:
        UsageError: nothing was tuned yet. CheckpointError: something is damaged.
    """
    member(folder)
    mine = (folder / PERSONAL / "metrics.json").exists() if personal is None else personal
    place = folder / (PERSONAL if mine else TUNED)
    if not (place / "metrics.json").exists():
        raise UsageError("nothing is tuned here yet", got=str(place), hint="Run `deltaloom party tune` first, to its end.")
    run = read_run_file(place / "run.yaml")
    front, tokenizer = load_half(folder / FRONT, "front")
    saved, record = native.read(place / "delta")
    native.check_base(front.model, record.base, front.fingerprint)
    tuned = restore(front.model, saved)
    kind = task_named(str(run.file.task))
    labels = LabelMap(tuple(record.base.labels)) if record.base.labels else None
    given = {key: value for key, value in run.file.data.items() if key not in LEFT_OUT}
    settings = DataSettings.parse({"train": "rows", **given}, "data")
    task = kind(settings, Targets(labels), front.model.config, tokenizer=tokenizer)
    return TunedFront(folder, run, parse_private(run.file.private), front, tuned, task, PartyState(folder / STATE))


@contextmanager
def channel_of(opened: TunedFront, run: str) -> Iterator[GrpcChannel]:
    """A stream for inference; `run` names it."""
    methods = [part.method for part in opened.tuned.attached() if not part.is_head]
    channel = connect(member(opened.folder), opened.settings, run=run, purpose="inference", methods=methods,
                      fingerprint=opened.front.fingerprint)
    try:
        yield channel
    finally:
        channel.close()


def predict(folder: Path, data: Sequence[Path], output: Path, *, max_new_tokens: int = 128, overwrite: bool = False,
            personal: bool | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Write a line for each row: where it came from, and the label or text that front and back give together.

    Raises:
        RefusedError: the output exists. UsageError: nothing was tuned yet. DataError: rows that cannot be used.
        OwnerAway, Refused: the owner cannot be reached, or says no.
    """
    if output.is_dir():
        raise RefusedError("the output is a folder, not a file", got=str(output), hint="Name the file to write.")
    if output.exists() and not overwrite:
        raise RefusedError("the output file exists", got=str(output), hint="Pass --overwrite, or choose another name.")
    opened = open_front(folder, personal=personal)
    task = opened.task
    found = read_rows([str(path) for path in data], task.settings, Path.cwd(), accepts=task.formats, numbers=task.numbers,
                      need_targets=False)
    say(f"Data: {len(found)} rows; {found.detected}")
    run = secrets.token_hex(16)
    guarding = guards_of(opened.settings, opened.state, run)
    chain = guarding.layers
    with channel_of(opened, run) as channel:
        if task.generates:
            writer = Writer(opened.tuned, opened.front, channel, task.tokenizer, chain)
            texts = writer.generate(task.prompts(found.rows), max_new_tokens=max_new_tokens)
            answers: list[dict[str, Any]] = [{"text": text} for text in texts]
        else:
            remote = RemoteBack(channel, opened.front, chain)
            model = FrontModel(opened.tuned, opened.front, remote, opened.settings.labels)
            answers = task.predict_all(model, task.encode(found.rows))
        traffic = channel.traffic
    lines = [json.dumps(finite({"row": index, "where": row.where, **answer}), ensure_ascii=False)
             for index, (row, answer) in enumerate(zip(found.rows, answers, strict=True))]
    write_atomic(output, "".join(line + "\n" for line in lines))
    say(f"Wrote {len(lines)} predictions to {output}; {traffic.up / 1e3:.0f} kB up, {traffic.down / 1e3:.0f} kB down")
    privacy = guarding.privacy()
    say(privacy_text(privacy))
    return {"rows": len(lines), "path": str(output), "up": traffic.up, "down": traffic.down, "privacy": privacy}


def chat(folder: Path, *, temperature: float = 0.0, max_new_tokens: int = 256, seed: int = 0, personal: bool | None = None,
         read: Callable[[str], str] = input, write: Callable[[str], Any] | None = None) -> None:
    """Read a line, write the answer of front and back as it comes, until an empty line.

    Raises:
        RefusedError: the model writes no text. OwnerAway, Refused: the owner cannot be reached, or says no.
    """
    opened = open_front(folder, personal=personal)
    if not opened.task.generates:
        raise RefusedError("this model does not write text", got=opened.task.name, hint="Use `deltaloom party predict`.")
    if temperature < 0:
        raise SettingsError("a temperature is at least 0", got=temperature)
    run = secrets.token_hex(16)
    guarding = guards_of(opened.settings, opened.state, run)
    with channel_of(opened, run) as channel:
        writer = Writer(opened.tuned, opened.front, channel, opened.task.tokenizer, guarding.layers)

        def answer(prompt: Any, turn: int) -> Iterator[str]:
            return writer.stream(prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed + turn)

        converse(opened.task, opened.tuned, answer, read, write or sys.stdout.write)
    print(privacy_text(guarding.privacy()), file=sys.stderr)
