"""A party's part in joint rounds: train, answer every phase, take the common values, until there is no further round.

What was trained in a round, and what a guard must not answer twice, is on the disk before it is sent: a party that was killed
sends the very same again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from deltaloom.errors import CheckpointError, DataError
from deltaloom.files import write_atomic
from deltaloom.private.guards.base import Answer, UpdateGuard
from deltaloom.private.round_messages import AnswerReply, AnswerRequest, RoundReply, RoundRequest, StandReply, StandRequest

Trained = tuple[Mapping[str, Tensor], int]
"""Values after a round's training, and the rows that it used."""


class Participant:
    """One party in joint rounds.

    ask: sends a request and gives the reply, again if the connection broke. train: (round, common values) -> what came of it.
    secret: 32 bytes that stay here, for guards. wait: pauses until it is worth asking again.
    """

    def __init__(self, name: str, folder: Path, ask: Callable[[RoundRequest], RoundReply],
                 train: Callable[[int, Mapping[str, Tensor]], Trained], *, wait: Callable[[StandReply], None],
                 guard: UpdateGuard | None = None, secret: bytes = b"") -> None:
        self.name, self._folder, self._ask, self._train = name, folder, ask, train
        self._wait, self._guard, self._secret = wait, guard, secret
        self._common: Mapping[str, Tensor] | None = None
        self._version = -1

    def run(self) -> Mapping[str, Tensor]:
        """All rounds; the common values at the end.

        Raises:
            DataError: the coordinator gave no common values, or another kind of reply. Whatever `ask` and `train` raise.
        """
        while True:
            stand = self._ask(StandRequest(self._version))
            if not isinstance(stand, StandReply):
                raise DataError("the coordinator did not say where the rounds stand", got=type(stand).__name__)
            if stand.common is not None:
                self._common, self._version = stand.common, stand.phase.version
            if self._common is None:
                raise DataError("the coordinator gave no common values")
            if stand.done:
                return self._common
            if stand.wanted:
                self._take_part(stand, self._common)
            else:
                self._wait(stand)

    def _take_part(self, stand: StandReply, common: Mapping[str, Tensor]) -> None:
        values, count = self._trained(stand, common)
        answer = Answer(values, count) if self._guard is None else self._guarded(self._guard, stand, values, count)
        reply = self._ask(AnswerRequest(stand.phase, answer.tensors, answer.count))
        if not isinstance(reply, AnswerReply):
            raise DataError("the coordinator did not take an answer", got=type(reply).__name__)

    def _trained(self, stand: StandReply, common: Mapping[str, Tensor]) -> Trained:
        """This round's values: from the disk, or trained now and kept."""
        path, named = self._folder / "round.safetensors", f"{stand.label.rpartition('/')[0]}/{stand.phase.version}"
        if path.exists():
            try:
                with safetensors.safe_open(path, "pt") as file:
                    facts = file.metadata() or {}
                    if facts.get("round") == named:
                        return {name: file.get_tensor(name) for name in file.keys()}, int(facts["count"])  # noqa: SIM118
            except (OSError, KeyError, ValueError, safetensors.SafetensorError):
                raise CheckpointError("what was trained in this round cannot be read", got=str(path),
                                      hint="Remove it to train the round again.") from None
        values, count = self._train(stand.phase.round, common)
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in values.items()}
        write_atomic(path, safetensors.torch.save(plain, metadata={"round": named, "count": str(count)}))
        return plain, count

    def _guarded(self, guard: UpdateGuard, stand: StandReply, values: Mapping[str, Tensor], count: int) -> Answer:
        path, half = self._folder / "guard.json", guard.half(self.name, stand.label, self._secret)
        if path.exists():
            try:
                state = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise CheckpointError("what a guard has answered in this round cannot be read", got=str(path),
                                      hint="Leave this round out: remove the file when the next one is open.") from None
            if state.get("label") == stand.label:
                half.load_state_dict(state)
        answer = half.answer(stand.phase.phase, stand.told, values, count)
        write_atomic(path, json.dumps({**half.state_dict(), "label": stand.label}))
        return answer
