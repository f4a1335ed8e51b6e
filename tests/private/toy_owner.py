"""A toy back with closed-form answers, and an owner's server around it that tests run as a real process and kill.

    python -m tests.private.toy_owner FOLDER LISTEN [SECONDS A REQUEST]
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import torch

from deltaloom.errors import RefusedError
from deltaloom.private.messages import (
    BackFacts,
    CloseRequest,
    DoneReply,
    ExtendReply,
    ExtendRequest,
    ForgottenError,
    GradientReply,
    GradientRequest,
    LossReply,
    LossRequest,
    OpenRequest,
    OutputsReply,
    OutputsRequest,
    ScoreReply,
    ScoreRequest,
)
from deltaloom.private.round_messages import AnswerReply, AnswerRequest, LeaveRequest, Phase, StandReply, StandRequest
from tests.private.wired import FACTS


class ToyBack:
    """loss = sum over places of |h|^2 * (label + 1); outputs = 3 h; a session's token is the sum of all that it saw, modulo."""

    def __init__(self, facts: BackFacts = FACTS, seconds: float = 0.0) -> None:
        self.facts, self.seconds = facts, seconds
        self.calls: list[tuple[str, object]] = []
        self._kept: dict = {}
        self._sessions: dict = {}
        self._lock = threading.Lock()

    def answer(self, party, request):
        with self._lock:
            self.calls.append((party, request))
        time.sleep(self.seconds)
        return getattr(self, "_" + type(request).__name__)(party, request)

    def _LossRequest(self, party, request: LossRequest):
        chosen = request.rows.hidden[request.places].double()
        scales = (request.labels + 1).double()
        gradient = torch.zeros(request.rows.hidden.shape, dtype=torch.float64)
        gradient.index_add_(0, request.places, 2 * chosen * scales[:, None])
        return LossReply((chosen.square().sum(1) * scales).sum().float(), gradient.float())

    def _OutputsRequest(self, party, request: OutputsRequest):
        if request.keep:
            self._kept[party, request.key] = request
        return OutputsReply(3 * request.rows.hidden[request.places])

    def _GradientRequest(self, party, request: GradientRequest):
        forward = request.forward or self._kept.get((party, request.key))
        if forward is None:
            raise ForgottenError("the owner was restarted")
        gradient = torch.zeros_like(forward.rows.hidden)
        return GradientReply(gradient.index_add_(0, forward.places, 3 * request.gradient))

    def _ScoreRequest(self, party, request: ScoreRequest):
        return ScoreReply(request.rows.hidden[request.places].sum(1) + request.labels)

    def _OpenRequest(self, party, request: OpenRequest):
        self._sessions[party, request.session] = []
        return DoneReply()

    def _ExtendRequest(self, party, request: ExtendRequest):
        cache = self._sessions.get((party, request.session))
        if cache is None:
            raise ForgottenError("no such session")
        offset = request.rows.offsets[0]
        if offset > len(cache):
            raise RefusedError("tokens are missing", got=offset, legal=len(cache))
        cache[offset:] = request.rows.hidden.sum(1).tolist()
        total = sum(cache)
        return ExtendReply(int(abs(total) * 1000) % 40, torch.full((self.facts.outputs,), total) if request.logits else None)

    def _CloseRequest(self, party, request: CloseRequest):
        self._sessions.pop((party, request.session), None)
        return DoneReply()


class ToyRounds:
    """Publishes the weighted mean as soon as two parties have answered."""

    def __init__(self) -> None:
        self.common, self.version, self.answers = {"a": torch.zeros(3)}, 0, {}
        self._lock = threading.Lock()

    def answer(self, party, request):
        with self._lock:
            if isinstance(request, StandRequest):
                common = self.common if request.have < self.version or request.have < 0 else None
                phase = Phase(self.version + 1, 1, "collect", self.version)
                return StandReply(phase, "toy", party not in self.answers, False, 9.0, {}, common)
            if isinstance(request, LeaveRequest):
                return DoneReply()
            assert isinstance(request, AnswerRequest)
            self.answers[party] = request
            if len(self.answers) == 2:
                total = sum(one.count for one in self.answers.values())
                self.common = {"a": sum(one.values["a"] * one.count for one in self.answers.values()) / total}
                self.version, self.answers = self.version + 1, {}
            return AnswerReply("accepted")


def main() -> None:
    from deltaloom.private.journal import log_to
    from deltaloom.private.service import Service

    log_to()
    folder, listen = Path(sys.argv[1]), sys.argv[2]
    seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    Service(folder, ToyBack(seconds=seconds), listen=listen, coordinator=lambda _: ToyRounds()).serve_until_stopped()


if __name__ == "__main__":
    main()
