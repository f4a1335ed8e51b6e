"""A party's runs: tuning on the emulator, then split tuning with the owner, alone or in joint rounds, then a personal delta.

Each is an ordinary run in the party's folder. Killed at any point, the same command goes on and ends with the same delta.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from deltaloom.checkpoint import native
from deltaloom.deltas.base import Method, method_record, methods_from
from deltaloom.errors import CheckpointError, RefusedError, SettingsError, UsageError
from deltaloom.events import Emitter, Privacy
from deltaloom.files import write_atomic
from deltaloom.generate import Prompt
from deltaloom.jobs.engine import Before, Engine, Here, Loop, Write, measured, written
from deltaloom.jobs.folder import check_folder
from deltaloom.jobs.party import (
    EMULATED,
    FRONT,
    PERSONAL,
    STATE,
    TUNED,
    PartyState,
    connect,
    guard_names,
    guards_of,
    member,
    own_methods,
)
from deltaloom.jobs.party_loop import ROUNDS, Alone, InRounds, OverGrpc, Training
from deltaloom.jobs.prepare import Prepared, Say, parse_parts
from deltaloom.jobs.runfile import Run
from deltaloom.jobs.scoring import SAMPLE_TOKENS
from deltaloom.jobs.serve import head_of_front
from deltaloom.jobs.tune import carry_out
from deltaloom.private.bars import on_front
from deltaloom.private.client import GrpcChannel
from deltaloom.private.cut import Half, Holder, split
from deltaloom.private.decode import Writer
from deltaloom.private.front import FrontModel
from deltaloom.private.halves import save_half
from deltaloom.private.mailbox import Mailbox
from deltaloom.private.messages import BackFacts
from deltaloom.private.personal import attach_personal
from deltaloom.private.remote import RemoteBack
from deltaloom.private.round_messages import Asked
from deltaloom.private.settings import PrivateSettings, parse_private
from deltaloom.report.card import model_card
from deltaloom.report.facts import read_run
from deltaloom.report.page import write_report
from deltaloom.report.privacy import privacy_text, promise_text
from deltaloom.train.run import TrainResult
from deltaloom.tuned import SavedDelta, Tuned, attach

NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def emulate(folder: Path, run: Run, *, overwrite: bool = False, say: Say = print) -> dict[str, Any]:
    """Tune the front's deltas on the owner's emulator, which the run file names as its model; nothing is sent.

    Raises:
        DeltaloomError: as `jobs.tune.tune`.
    """
    member(folder)
    settings = parse_private(run.file.private)
    run = _placed(run, folder / EMULATED, say)
    if not overwrite and _cut_at_its_report(folder / EMULATED):
        return _reported(folder / EMULATED, say)
    head = _head_of(parse_parts(run).task.name)

    def through(prepared: Prepared) -> Here:
        front, _ = split(prepared.loaded.model, prepared.task.name, settings.cut, head=head)
        prepared = _on_front(prepared, front)
        before = measured(prepared, prepared.loaded.model, written(prepared.task))
        methods = prepared.parts.methods
        heads = head_of_front(prepared.loaded, front, methods)
        tuned = attach(prepared.loaded.model, methods, heads=heads, tokenizer=prepared.loaded.tokenizer, seed=run.file.seed)
        return Here(prepared, tuned, tuned, before)

    return carry_out(run, through, resume=_goes_on(folder / EMULATED, overwrite), overwrite=overwrite, say=say)


def tune(folder: Path, run: Run, *, personal: bool = False, overwrite: bool = False, say: Say = print) -> dict[str, Any]:
    """Split tuning with the owner's back: the deltas of `emulate` plugged in and tuned on, in joint rounds if the owner holds
    any; with `personal` own deltas behind the common ones.

    Raises:
        OwnerAway, Refused: the owner cannot be reached, or says no. RefusedError: the emulator's front is not the model's.
        DeltaloomError: as `jobs.tune.tune`.
    """
    membership, settings, state = member(folder), parse_private(run.file.private), PartyState(folder / STATE)
    which = PERSONAL if personal else TUNED
    if personal and not (folder / TUNED / "metrics.json").exists():
        raise UsageError("a personal delta comes on top of the common one, which is not tuned yet", got=str(folder),
                         hint="Run `deltaloom party tune` without --personal first.")
    run = _placed(run, folder / which, say)
    parts = parse_parts(run)
    if parts.continued is not None:
        raise SettingsError("deltas: a party's run begins with what it tuned on the emulator", got="from", legal="{method: NAME}")
    if not overwrite and _cut_at_its_report(folder / which):
        return _reported(folder / which, say) | {"private": state.read(which).get("private", {})}
    on_disk = _goes_on(folder / which, overwrite)
    check_folder(folder / which, resume=on_disk, overwrite=overwrite)
    if not on_disk and not personal:
        shutil.rmtree(state.folder / ROUNDS, ignore_errors=True)
    name = state.run_name(which, fresh=not on_disk)
    methods = own_methods(settings, parts.methods, methods_from) if personal else parts.methods
    channel = connect(membership, settings, run=name, purpose="training", methods=methods)
    try:
        run = _in_owners_numbers(run, channel.facts)
        session = _Session(folder, settings, state, channel, name, methods, personal, say)
        found = carry_out(run, session.engine, resume=on_disk, overwrite=overwrite, say=say)
        facts = session.facts()
        say(privacy_text(found["privacy"]))
        say(f"Traffic: {facts['up'] / 1e6:.1f} MB up, {facts['down'] / 1e6:.1f} MB down; rounds: {facts['rounds']}")
        state.write(which, state.read(which) | {"private": facts})
        return found | {"private": facts}
    finally:
        channel.close()


class _Session:
    """One command's session with the owner, from the prepared run to its engine."""

    def __init__(self, folder: Path, settings: PrivateSettings, state: PartyState, channel: GrpcChannel, name: str,
                 methods: Sequence[Method], personal: bool, say: Say) -> None:
        self.folder, self.settings, self.state, self.channel, self.name = folder, settings, state, channel, name
        self.methods, self.personal, self.say = tuple(methods), personal, say
        self.guarding = guards_of(settings, state, name)
        self.training: Training | None = None
        self.tokenizer: Any = None

    def engine(self, prepared: Prepared) -> Split:
        """The front with its deltas, and the back at the owner."""
        front = front_of(prepared, self.settings.cut, self.channel.facts)
        self.tokenizer = prepared.loaded.tokenizer
        self._keep(front, prepared)
        loaded = replace(prepared.loaded, model=front.model, fingerprint=front.fingerprint)
        parts = replace(prepared.parts, methods=self.methods)
        prepared = _on_front(replace(prepared, loaded=loaded, parts=parts), front)
        tuned = self._tuned(prepared, front)
        remote = RemoteBack(self.channel, front, self.guarding.layers, run=self.name)
        model = FrontModel(tuned, front, remote, self.settings.labels)
        self.training = self._training(prepared, model)
        self.say(f"Guards: {guard_names(self.settings.row_guards())}")
        self.say(promise_text(self.privacy()))
        write = _writer(tuned, front, self)
        with tuned.use(None):
            before = measured(prepared, model, write)
        return Split(prepared, tuned, model, before, self.training, write, self.privacy)

    def privacy(self) -> dict[str, Any]:
        """What the guards were worth so far."""
        return self.guarding.privacy(rounds=isinstance(self.training, InRounds))

    def _training(self, prepared: Prepared, model: FrontModel) -> Training:
        """In joint rounds if the owner holds any, or another engine brings them."""
        window, guard, mailbox = self.settings.window, self.settings.guard_of_updates(), self.settings.mailbox
        held = bool(self.channel.welcome.limits.get("rounds"))
        if held and mailbox is not None:
            raise SettingsError("the owner holds joint rounds itself", got="private.mailbox",
                                hint="Leave the mailbox out, or ask the owner to serve without --rounds.")
        if self.personal or not (held or mailbox is not None):
            return Alone(prepared, model, window)
        membership = member(self.folder)
        party = membership.contact.party

        def coordinator() -> Asked:
            if mailbox is not None:
                return Mailbox(self.folder / mailbox, party, model.tuned.delta_state(), say=self.say)
            return OverGrpc(connect(membership, self.settings, run=self.name, purpose="rounds", methods=self.methods))

        return InRounds(prepared, model, window, state=self.state, which=TUNED, party=party, guard=guard, connect=coordinator)

    def facts(self) -> dict[str, Any]:
        """What the run cost on the wire, in all its processes."""
        earlier = self.state.read(PERSONAL if self.personal else TUNED).get("private", {})
        traffic, training = self.channel.traffic, self.training
        rounds, rows = (training.rounds, training.samples) if training else (0, 0)
        return {"up": traffic.up + earlier.get("up", 0), "down": traffic.down + earlier.get("down", 0),
                "requests": traffic.requests + earlier.get("requests", 0), "rounds": rounds, "samples": rows}

    def _tuned(self, prepared: Prepared, front: Half) -> Tuned:
        seed, tokenizer = prepared.run.file.seed, prepared.loaded.tokenizer
        if self.personal:
            common, _ = native.read(self.folder / TUNED / "delta")
            own = [on_front(method, front) for method in self.methods]
            return attach_personal(front.model, common, own, tokenizer=tokenizer, seed=seed)
        methods = prepared.parts.methods
        heads = head_of_front(prepared.loaded, front, methods)
        tuned = attach(front.model, methods, heads=heads, tokenizer=tokenizer, seed=seed)
        emulated = self._emulated(methods)
        if emulated is None:
            self.say("Nothing was tuned on the emulator: the deltas begin new.")
        else:
            tuned.load_delta_state(emulated.state)
        return tuned

    def _emulated(self, methods: Sequence[Method]) -> SavedDelta | None:
        place = self.folder / EMULATED / "delta"
        if not place.is_dir():
            return None
        saved, _ = native.read(place)
        before = [method_record(part.method) for part in saved.methods if not part.is_head]
        now = [method_record(method) for method in methods]
        if before != now:
            raise CheckpointError("what was tuned on the emulator has other deltas than this run file", got=now, legal=before,
                                  hint="Use the same `deltas` and `private.cut`, or run `deltaloom party emulate` again.")
        return saved

    def _keep(self, front: Half, prepared: Prepared) -> None:
        """The party's half in a folder of its own, for predictions and chat."""
        place = self.folder / FRONT
        known = self.state.read(FRONT)
        facts = {"front": front.front, "head": front.head, "fingerprint": front.fingerprint, "cut": front.cut}
        if known != facts or not place.is_dir():
            save_half(front, place, prepared.loaded.tokenizer, replace=True)
            self.state.write(FRONT, facts)


class Split(Engine):
    """A front here, its back at the owner."""

    def __init__(self, prepared: Prepared, tuned: Tuned, model: nn.Module, before: Before, training: Training,
                 write: Write | None, privacy: Callable[[], dict[str, Any]]) -> None:
        super().__init__(prepared, tuned, model, before)
        self.training, self._write, self._privacy = training, write, privacy

    @property
    def write(self) -> Write | None:
        """Over the cut, where the head is at the owner."""
        return self._write

    def resume(self, folder: Path, identity: dict[str, str], emit: Emitter) -> bool:
        """As the training goes: from a checkpoint, in the round that was under way."""
        return self.training.resume(folder, identity, emit)

    def train(self, loop: Loop) -> TrainResult:
        """Over the cut."""
        return self.training.run(loop, (lambda tuned: self.scores().metrics) if self.prepared.held else None)

    def told(self, emit: Emitter) -> dict[str, Any]:
        """What the guards were worth, over all that was sent, evaluations included."""
        facts = self._privacy()
        emit(Privacy(**facts))
        return {"privacy": facts}

    def close(self) -> None:
        """The streams of rounds."""
        self.training.close()


def front_of(prepared: Prepared, cut: int, facts: BackFacts) -> Half:
    """The front in an emulator, as the owner's model has it.

    Raises:
        RefusedError: it is not the front of the owner's model, bit for bit.
    """
    if cut != facts.cut:
        raise RefusedError("this run file cuts at another place than the owner", got=f"private.cut: {cut}", legal=facts.cut)
    head: Holder = "owner" if facts.outputs else "party"
    front, _ = split(prepared.loaded.model, prepared.task.name, cut, head=head)
    if front.front != facts.front:
        raise RefusedError("the front in this emulator is not that of the owner's model, bit for bit",
                           got=f"{prepared.loaded.source}: sha256 {front.front[:16]}...", legal=f"{facts.front[:16]}...",
                           hint="Ask the owner for the emulator of the model that it serves; check private.cut.")
    config = type(front.config).from_dict(front.config.to_dict() | {"num_hidden_layers": facts.blocks})
    return replace(front, fingerprint=facts.fingerprint, config=config)


def _writer(tuned: Tuned, front: Half, session: _Session) -> Write | None:
    """What writes texts with the owner's back; None where it gives no tokens."""
    if front.task != "causal-lm" or front.has_head:
        return None

    def write(model: nn.Module, prompts: Sequence[Prompt]) -> list[str]:
        channel = connect(member(session.folder), session.settings, run=session.name, purpose="inference",
                          methods=session.methods, fingerprint=front.fingerprint)
        try:
            writer = Writer(tuned, front, channel, session.tokenizer, session.guarding.layers)
            return writer.generate(prompts, max_new_tokens=SAMPLE_TOKENS)
        finally:
            channel.close()

    return write


def _on_front(prepared: Prepared, front: Half) -> Prepared:
    methods = tuple(on_front(method, front) for method in prepared.parts.methods)
    return replace(prepared, parts=replace(prepared.parts, methods=methods))


def _head_of(task: str) -> Holder:
    return "owner" if task == "causal-lm" else "party"


def _placed(run: Run, folder: Path, say: Say) -> Run:
    """The run in the party's folder.

    Raises:
        SettingsError: it has a strategy, which changes the course of one run in one place.
    """
    if run.file.strategy is not None:
        raise SettingsError("a party's run cannot have a strategy: its deltas are joined with others'", got="strategy",
                            hint="Leave the section out, or tune alone with `deltaloom tune`.")
    if run.file.output is not None:
        say(f"The run file's output is not used: a party's run lies in its own folder, {folder}")
    return replace(run, file=run.file.model_copy(update={"output": str(folder)}))


def _goes_on(folder: Path, overwrite: bool) -> bool:
    """Whether an unfinished run lies there, to be gone on with; its first file is the log, which a kill may leave alone."""
    begun = any((folder / name).exists() for name in ("run.yaml", "events.jsonl"))
    return not overwrite and begun and not (folder / "metrics.json").exists()


def _cut_at_its_report(folder: Path) -> bool:
    """Whether a kill came between a run's figures, which are its end, and the pages about them."""
    return (folder / "metrics.json").exists() and not (folder / "report.html").exists()


def _reported(folder: Path, say: Say) -> dict[str, Any]:
    """Write the pages of a run that has ended; its figures."""
    say(f"The run had ended; what was missing of its report is written: {folder / 'report.html'}")
    write_atomic(folder / "README.md", model_card(read_run(folder)))
    write_report([folder], folder / "report.html")
    return dict(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))


def _in_owners_numbers(run: Run, facts: BackFacts) -> Run:
    """The run with the owner's precision, unless it names another one itself (which is refused later)."""
    train = dict(run.file.train)
    if train.get("precision", "auto") == "auto":
        train["precision"] = NAMES.get(facts.dtype, facts.dtype)
    return replace(run, file=run.file.model_copy(update={"train": train}))
