"""The owner's server: the back of a model, and joint rounds if it holds any."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaloom.deltas.base import Method, methods_from
from deltaloom.errors import RefusedError, SettingsError, UsageError
from deltaloom.files import write_atomic
from deltaloom.jobs.owner import ADDRESS, POLICY, authority_of
from deltaloom.jobs.prepare import DTYPES, head_methods
from deltaloom.jobs.runfile import read_mapping
from deltaloom.models import LoadedModel, load_model, own_task
from deltaloom.models.load import NEW_HEAD
from deltaloom.private.audit import Audit
from deltaloom.private.back import Back
from deltaloom.private.bars import on_front
from deltaloom.private.coordinating import DurableRounds
from deltaloom.private.cut import TASKS, Half, Holder, split
from deltaloom.private.journal import log_to, note_rounds
from deltaloom.private.means.base import mean_named
from deltaloom.private.policy import read_policy
from deltaloom.private.rounds import Coordinator, RoundSettings
from deltaloom.private.service import Service
from deltaloom.private.settings import update_guard_named
from deltaloom.settings import Settings
from deltaloom.tuned import attach

ROUNDS, RUN = "rounds.safetensors", "rounds.json"
Say = Callable[[str], None]


class Rounds(Settings):
    """Joint rounds as `owner serve` is told of them."""

    rounds: int
    parties: int = 2
    quorum: int | None = None
    deadline: float = 3600.0
    norm_bound: float | None = None
    mean: str = "weighted"
    update_guard: str | None = None
    deltas: Path
    seed: int = 0


@dataclass(frozen=True)
class Served:
    """What is served: of which task, with which labels if its head is new, and who holds the head."""

    model: str
    task: str | None = None
    labels: tuple[str, ...] = ()
    head: Holder | None = None
    cut: int | None = None
    precision: str = "fp32"


def serve(folder: Path, served: Served, *, listen: str = ADDRESS, rounds: Rounds | None = None, fresh_rounds: bool = False,
          say: Say = print) -> dict[str, Any]:
    """Serve until a signal asks to stop (SIGTERM, Ctrl-C); logs go to stderr as JSON lines.

    `fresh_rounds` forgets the rounds of an earlier run; else they are gone on with.

    Raises:
        UsageError: no owner's folder, another server runs on it, or the address cannot be used.
        SettingsError, RefusedError: the model cannot be cut so, or the rounds' settings contradict one another.
    """
    authority_of(folder)
    policy = read_policy(folder / POLICY)
    if served.cut is not None:
        policy = policy.model_copy(update={"cut": served.cut})
    if served.precision not in DTYPES:
        raise SettingsError("unknown precision", got=served.precision, legal=DTYPES)
    methods = methods_of(rounds.deltas) if rounds is not None else ()
    loaded, task = _load(served)
    new = task in NEW_HEAD
    head = served.head or ("party" if new else "owner")
    if new and head == "owner" and loaded.new_parameters:
        raise RefusedError("this model has no trained head, and the owner's side never trains one", got="head: owner",
                           legal="head: party")
    front, back = split(loaded.model, task, policy.cut, head=head)
    make = None if rounds is None else _coordinator(folder, rounds, loaded, front, methods, fresh_rounds)
    log_to()
    service = Service(folder, Back(back), listen=listen, policy=policy, coordinator=make)
    say(f"Serving {loaded.source} for {task}, cut after {policy.cut} of {back.blocks} blocks, head at the {head}, "
        f"at {service.address}; Ctrl-C stops it." + (f" Joint rounds: {rounds.rounds}." if rounds else ""))
    stopped = service.serve_until_stopped()
    return {"address": service.address, "stopped": stopped}


def methods_of(path: Path) -> tuple[Method, ...]:
    """The methods of a file's `deltas` list; a run file is such a file.

    Raises:
        SettingsError: no file, or no list of methods.
    """
    entries = read_mapping(path, ("deltas",)).get("deltas")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise SettingsError(f"{path.name} lists no methods", got=entries, legal="deltas: [{method: NAME, ...}]")
    return methods_from(entries)


def head_of_front(loaded: LoadedModel, front: Half, methods: Sequence[Method]) -> list[Method]:
    """Full tuning of a new head, where the front has it."""
    return head_methods(replace(loaded, model=front.model), tuple(methods)) if front.has_head else []


def _load(served: Served) -> tuple[LoadedModel, str]:
    task = served.task or own_task(served.model)
    if task not in TASKS:
        raise SettingsError("the owner has to say what the model is for" if task is None else "this task cannot be served",
                            got=task, legal=TASKS, hint="Name it with --task.")
    return load_model(served.model, task=task, labels=list(served.labels) or None, dtype=DTYPES[served.precision]), task


def _coordinator(folder: Path, rounds: Rounds, loaded: LoadedModel, front: Half, methods: Sequence[Method],
                 fresh: bool) -> Callable[[Audit], DurableRounds]:
    """What makes the coordinator, once the server has the folder; the rounds' settings are checked now."""
    common = _common(loaded, front, methods, rounds.seed)
    settings = RoundSettings(rounds=rounds.rounds + 1, parties=rounds.parties, quorum=rounds.quorum or rounds.parties,
                             deadline=rounds.deadline, norm_bound=rounds.norm_bound)
    mean, guard = mean_named(rounds.mean)(), update_guard_named(rounds.update_guard, "--update-guard")
    Coordinator(settings, mean, common, run="tried", guard=guard)

    def make(audit: Audit) -> DurableRounds:
        if fresh:
            (folder / ROUNDS).unlink(missing_ok=True)
            (folder / RUN).unlink(missing_ok=True)
        made = Coordinator(settings, mean, common, run=_run_name(folder / RUN), guard=guard)
        return DurableRounds(made, folder / ROUNDS, tell=note_rounds(audit))

    return make


def _common(loaded: LoadedModel, front: Half, methods: Sequence[Method], seed: int) -> dict[str, Tensor]:
    placed = [on_front(method, front) for method in methods]
    tuned = attach(front.model, placed, heads=head_of_front(loaded, front, placed), tokenizer=loaded.tokenizer, seed=seed)
    try:
        return {name: tensor.clone() for name, tensor in tuned.delta_state().items()}
    finally:
        tuned.detach()


def _run_name(path: Path) -> str:
    """The name of these rounds, unlike any other; kept, so that a restarted owner goes on with them."""
    if path.exists():
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["run"])
        except (ValueError, KeyError, TypeError):
            raise UsageError("the name of the rounds cannot be read", got=str(path),
                             hint="Begin new ones with --fresh-rounds.") from None
    name = secrets.token_hex(8)
    write_atomic(path, json.dumps({"run": name}), mode=0o600)
    return name
