"""Joint rounds: the coordinator's logic as a state machine without network, threads or clocks.

    waiting -> [ open -> answers -> quorum and deadline -> mean -> publish ] x rounds -> done

A round has one phase, in which parties send their values, or the phases of an update guard. Every call passes the time of the
coordinator's own clock; parties send no times, so clocks that disagree cannot matter, and what has elapsed is saved, not when
it began, so that the clock may be another one after a restart. Whoever drives it saves after each call and only then replies:
killed at any point, the party repeats itself, and a repeat of what was kept changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor

from deltaloom.errors import CheckpointError, DataError, RefusedError, SettingsError
from deltaloom.files import write_atomic
from deltaloom.private.guards.base import Answer, Roll, UpdateGuard
from deltaloom.private.means.base import Mean, Weighed
from deltaloom.private.means.weighted import Weighted
from deltaloom.private.round_messages import Phase
from deltaloom.settings import Settings

PLAIN = ("collect",)
MOST_SAMPLES = 2**40
FORMAT = 1


class RoundSettings(Settings):
    """How joint rounds are run."""

    rounds: int = Field(ge=1)
    """Rounds in all."""
    parties: int = Field(ge=1)
    """The first round opens when that many have joined; those who join later take part from the next round on."""
    quorum: int = Field(ge=1)
    """A phase may close at its deadline if that many have answered; if fewer, it goes on until they have."""
    deadline: float = Field(default=3600.0, gt=0)
    """Seconds that a phase waits for all, by the coordinator's clock."""
    norm_bound: float | None = Field(default=None, gt=0)
    """The largest Euclidean norm of a party's change of the common values; a longer one is shortened to it."""


@dataclass(frozen=True)
class Happened:
    """What the coordinator did: opened, accepted, repeated, late, waiting (deadline without quorum), restarted, shortened,
    closed, published, done."""

    what: str
    round: int
    phase: str
    parties: tuple[str, ...] = ()


@dataclass(frozen=True)
class Receipt:
    """The fate of an answer: `late` means that it was not used and will not be."""

    status: Literal["accepted", "repeat", "late"]
    happened: tuple[Happened, ...]


@dataclass(frozen=True)
class Told:
    """What a party is told. `told`: for each phase so far what an update guard tells it; `wanted`: its answer is waited for."""

    ticket: Phase
    label: str
    wanted: bool
    done: bool
    told: Mapping[str, Mapping[str, Tensor]]


class Coordinator:
    """The state machine.

    Raises:
        SettingsError: quorum, mean and guard cannot go together.
    """

    def __init__(self, settings: RoundSettings, mean: Mean, common: Mapping[str, Tensor], *, run: str,
                 guard: UpdateGuard | None = None) -> None:
        """`common`: the values that parties start from, version 0; `run`: names this run unlike any other."""
        _check_settings(settings, mean, guard)
        self.settings, self.mean, self.guard, self.run = settings, mean, guard, run
        self.common = {name: tensor.detach().clone().contiguous() for name, tensor in sorted(common.items())}
        self.version, self.round, self.attempt = 0, 0, 1
        self.phase = 0
        self.members: tuple[str, ...] = ()
        self.roster: tuple[str, ...] = ()
        self._answers: dict[str, dict[str, Answer]] = {}
        self._digests: dict[str, str] = {}  # of all that was ever accepted, so that late repeats are known
        self._elapsed, self._warned = 0.0, 0
        self._clock: float | None = None

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases of a round."""
        return self.guard.phases if self.guard else PLAIN

    @property
    def done(self) -> bool:
        """Whether all rounds are over."""
        return self.version >= self.settings.rounds

    @property
    def is_open(self) -> bool:
        """Whether answers are waited for."""
        return self.round > self.version and not self.done

    @property
    def label(self) -> str:
        """Names run, round and attempt."""
        return f"{self.run}/{self.round}/{self.attempt}"

    @property
    def ticket(self) -> Phase:
        """What an answer has to name now."""
        return Phase(self.round, self.attempt, self.phases[self.phase], self.version)

    def seconds_left(self) -> float | None:
        """Until the deadline of the open phase, as of the last call; None if none is open."""
        return max(0.0, self.settings.deadline - self._elapsed) if self.is_open else None

    def told(self, party: str) -> Told:
        """Where the rounds stand for one party."""
        roll, phases = self._roll(), self.phases[:self.phase + 1]
        mine = self.is_open and party in self._expected()
        told = {phase: self.guard.told(roll, phase, party) for phase in phases} if self.guard and mine else {}
        wanted = mine and party not in self._answers.get(self.phases[self.phase], {})
        return Told(self.ticket, self.label, wanted, self.done, told)

    def join(self, party: str, now: float) -> tuple[Happened, ...]:
        """A party takes part from the next round on; joining twice is joining."""
        self._tick(now)
        self.members = tuple(sorted({*self.members, party}))
        return self._advance()

    def leave(self, party: str, now: float) -> tuple[Happened, ...]:
        """A party that will not come back: nobody waits for it any longer; what it already sent in this round counts."""
        self._tick(now)
        self.members = tuple(member for member in self.members if member != party)
        return self._advance()

    def tick(self, now: float) -> tuple[Happened, ...]:
        """Time passes: a phase may close, or be found to wait."""
        self._tick(now)
        return self._advance()

    def submit(self, party: str, ticket: Phase, answer: Answer, now: float) -> Receipt:
        """An answer of a party.

        Raises:
            RefusedError: it is not of this round's parties, names the future, or differs from what it answered before.
            DataError: names, shapes, types or values are not those of the phase. Nothing is changed.
        """
        self._tick(now)
        key, digest = _key(party, ticket), _digest(answer)
        if key in self._digests:
            if self._digests[key] != digest:
                raise RefusedError(f"{party} answered this phase of round {ticket.round} before, with other values",
                                   hint="Send the first answer again, or fetch the common values and go on from there.")
            return Receipt("repeat", self._advance(Happened("repeat", ticket.round, ticket.phase, (party,))))
        if self._past(ticket):
            return Receipt("late", self._advance(Happened("late", ticket.round, ticket.phase, (party,))))
        if ticket != self.ticket or not self.is_open:
            raise RefusedError("this answer is for no open phase", got=ticket, legal=self.ticket)
        if party not in self._expected():
            raise RefusedError(f"{party} has no part in this phase of round {self.round}", legal=self._expected(),
                               hint="It may join the next round.")
        self._check(party, answer)
        kept = {name: tensor.detach().clone().contiguous() for name, tensor in answer.tensors.items()}
        self._answers.setdefault(ticket.phase, {})[party] = Answer(kept, answer.count)
        self._digests[key] = digest
        return Receipt("accepted", self._advance(Happened("accepted", ticket.round, ticket.phase, (party,))))

    # Steps of the machine.

    def _tick(self, now: float) -> None:
        if not math.isfinite(now):
            raise DataError("the clock gave no time", got=now)
        if self._clock is not None and self.is_open:
            self._elapsed += max(0.0, now - self._clock)  # a clock that is set back stops the time, it does not turn it back
        self._clock = now

    def _advance(self, *first: Happened) -> tuple[Happened, ...]:
        happened = list(first)
        while True:
            step = self._step()
            happened += step
            if not step or step[-1].what == "waiting":
                return tuple(happened)

    def _step(self) -> list[Happened]:
        """One change of state, or none."""
        if self.done:
            return []
        if not self.is_open:
            return self._open() if len(self.members) >= self._to_open() else []
        phase, expected = self.phases[self.phase], self._expected()
        answered = self._answers.get(phase, {})
        late = self._elapsed >= self.settings.deadline
        if len(answered) >= self._needed() and (late or set(answered) >= set(expected)):
            return self._close(phase)
        if self.phase > 0 and (late or len({*expected, *answered}) < self._needed()):
            return self._restart()
        overdue = int(self._elapsed // self.settings.deadline)
        if overdue > self._warned:
            self._warned = overdue
            return [Happened("waiting", self.round, phase, tuple(sorted(set(expected) - set(answered))))]
        return []

    def _to_open(self) -> int:
        return self.settings.parties if self.version == 0 else self.settings.quorum

    def _open(self) -> list[Happened]:
        self.round, self.attempt, self.roster = self.version + 1, 1, self.members
        self._begin(0)
        return [Happened("opened", self.round, self.phases[0], self.roster)]

    def _begin(self, phase: int) -> None:
        self.phase, self._elapsed, self._warned = phase, 0.0, 0
        if phase == 0:
            self._answers = {}

    def _restart(self) -> list[Happened]:
        """Too few are left to end this attempt: the round begins again with new masks and whoever is a member now."""
        phase, missing = self.phases[self.phase], set(self._expected()) - set(self._answers.get(self.phases[self.phase], {}))
        self.attempt, self.roster = self.attempt + 1, self.members
        self._begin(0)
        return [Happened("restarted", self.round, phase, tuple(sorted(missing)))]

    def _close(self, phase: str) -> list[Happened]:
        answered = tuple(sorted(self._answers[phase]))
        closed = [Happened("closed", self.round, phase, answered)]
        if self.phase + 1 < len(self.phases):
            self._begin(self.phase + 1)
            return closed
        shortened: list[Happened] = []
        try:
            values = self.guard.mean(self._roll()) if self.guard else self._plain_mean(shortened)
        except DataError:  # shares that do not fit: some party sent wrong ones; nobody's values were learnt
            return closed + self._restart()
        self.common = {name: values[name].to(tensor.dtype).contiguous() for name, tensor in self.common.items()}
        self.version, self._answers = self.round, {}
        published = Happened("published", self.round, phase, answered)
        return [*closed, *shortened, published, *([Happened("done", self.round, phase)] if self.done else [])]

    def _plain_mean(self, happened: list[Happened]) -> dict[str, Tensor]:
        updates = []
        for party, answer in sorted(self._answers[PLAIN[0]].items()):
            values = {name: answer.tensors[name].double() for name in self.common}
            if self.settings.norm_bound is not None:
                values, short = bounded(values, self.common, self.settings.norm_bound)
                happened += [Happened("shortened", self.round, PLAIN[0], (party,))] if short else []
            updates.append(Weighed(values, answer.count))
        return self.mean.combine(updates)

    # Questions about the state.

    def _expected(self) -> tuple[str, ...]:
        """Who may answer the open phase: the roster, then those who answered the phase before; members only."""
        before = self.roster if self.phase == 0 else sorted(self._answers[self.phases[self.phase - 1]])
        return tuple(party for party in before if party in self.members)

    def _needed(self) -> int:
        if not self.guard or self.phase == 0:
            return max(self.settings.quorum, 0 if self.guard else self.mean.needed())
        began = self.guard.needed(len(self._answers[self.phases[0]]))
        return began if self.phase + 1 == len(self.phases) else max(self.settings.quorum, began)

    def _past(self, ticket: Phase) -> bool:
        if ticket.phase not in self.phases:
            return False
        where = (ticket.round, ticket.attempt, self.phases.index(ticket.phase))
        closed = (self.version, math.inf, 0) if not self.is_open else (self.round, self.attempt, self.phase - 1)
        return (1, 1, 0) <= where <= closed

    def _roll(self) -> Roll:
        return Roll(self.label, self.roster, self._answers, {name: tuple(tensor.shape) for name, tensor in self.common.items()})

    def _check(self, party: str, answer: Answer) -> None:
        if self.guard:
            self.guard.check(self._roll(), self.phases[self.phase], party, answer)
            return
        problems = [f"'{name}' is missing" for name in self.common if name not in answer.tensors]
        for name, tensor in answer.tensors.items():
            if name not in self.common:
                problems.append(f"'{name}' is not part of the common values")
            elif tensor.shape != self.common[name].shape or not tensor.is_floating_point():
                problems.append(f"'{name}' is {tensor.dtype} {tuple(tensor.shape)}, not {tuple(self.common[name].shape)}")
            elif not bool(tensor.isfinite().all()):
                problems.append(f"'{name}' has values that are not finite")
        if not 1 <= answer.count <= MOST_SAMPLES:
            problems.append(f"{answer.count} samples")
        if problems:
            raise DataError(f"the values of {party} do not fit this round", problems=problems[:20])

    # Checkpoints.

    def save(self, path: Path) -> None:
        """Everything in one file, complete or absent."""
        tensors = {f"common/{name}": tensor for name, tensor in self.common.items()}
        counts: dict[str, dict[str, int]] = {}
        for phase, answers in self._answers.items():
            for party, answer in answers.items():
                counts.setdefault(phase, {})[party] = answer.count
                tensors |= {f"answer/{phase}/{len(party)}/{party}/{name}": tensor for name, tensor in answer.tensors.items()}
        state = {"format": FORMAT, "settings": self._identity(), "version": self.version, "round": self.round,
                 "attempt": self.attempt, "phase": self.phase, "members": self.members, "roster": self.roster,
                 "counts": counts, "digests": self._digests, "elapsed": self._elapsed, "warned": self._warned}
        write_atomic(path, safetensors.torch.save(tensors, metadata={"rounds": json.dumps(state)}))

    def restore(self, path: Path) -> None:
        """What `save` wrote, bit for bit; the clock starts anew.

        Raises:
            CheckpointError: missing, damaged, or of another run, settings or values; nothing is changed.
        """
        try:
            with safetensors.safe_open(path, "pt") as file:
                state = json.loads((file.metadata() or {})["rounds"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            if state["format"] != FORMAT or state["settings"] != self._identity():
                raise CheckpointError("these rounds are of another run or of other settings", got=state["settings"],
                                      legal=self._identity(), hint="Start with the same settings, or in a new folder.")
            common = {name: tensors[f"common/{name}"] for name in self.common}
            answers = {phase: {party: Answer(_under(tensors, f"answer/{phase}/{len(party)}/{party}/"), int(count))
                               for party, count in sorted(counts.items())} for phase, counts in state["counts"].items()}
            places = [int(state[key]) for key in ("version", "round", "attempt", "phase", "warned")]
            members, roster = tuple(map(str, state["members"])), tuple(map(str, state["roster"]))
            digests, elapsed = dict(state["digests"]), float(state["elapsed"])
        except (OSError, KeyError, TypeError, ValueError, AttributeError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"the rounds' checkpoint {path.name} cannot be read", got=str(error),
                                  hint="Start the rounds in a new folder.") from None
        self.version, self.round, self.attempt, self.phase, self._warned = places
        self.common, self._answers, self.members, self.roster = common, answers, members, roster
        self._digests, self._elapsed, self._clock = digests, elapsed, None

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be gone on with."""
        shapes = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in self.common.items()}
        named = [[part.name, part.as_dict()] for part in (self.mean, self.guard) if part is not None]
        return json.loads(json.dumps({"run": self.run, "rounds": self.settings.as_dict(), "parts": named, "shapes": shapes}))


def bounded(values: Mapping[str, Tensor], common: Mapping[str, Tensor], bound: float) -> tuple[dict[str, Tensor], bool]:
    """(values whose change from `common` has at most that norm over all tensors, whether it was longer); float64."""
    change = {name: values[name] - common[name].double() for name in common}
    norm = math.sqrt(sum(float((part * part).sum()) for part in change.values()))
    if norm <= bound:
        return dict(values), False
    return {name: common[name].double() + part * (bound / norm) for name, part in change.items()}, True


def _check_settings(settings: RoundSettings, mean: Mean, guard: UpdateGuard | None) -> None:
    if settings.quorum > settings.parties:
        raise SettingsError("the quorum is larger than the number of parties", got=settings.quorum,
                            legal=f"1 to {settings.parties}")
    if guard is None:
        if settings.parties < mean.needed():
            raise SettingsError(f"the mean '{mean.name}' needs more parties", got=settings.parties,
                                legal=f"at least {mean.needed()}")
        return
    guard.needed(settings.quorum)
    if settings.norm_bound is not None or not isinstance(mean, Weighted):
        raise SettingsError("what hides single updates gives the weighted mean, and leaves nothing to bound or to trim",
                            got=guard.name if isinstance(mean, Weighted) else f"{guard.name} and the mean '{mean.name}'",
                            hint="Take the weighted mean without a norm bound, or no update guard.")


def _key(party: str, ticket: Phase) -> str:
    return f"{ticket.round}/{ticket.attempt}/{ticket.phase}/{party}"


def _digest(answer: Answer) -> str:
    parts = [str(answer.count).encode()]
    for name, tensor in sorted(answer.tensors.items()):
        plain = tensor.detach().contiguous()
        parts += [f"{name}|{plain.dtype}|{tuple(plain.shape)}".encode(), plain.view(-1).view(torch.uint8).numpy().tobytes()]
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).hexdigest()


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

