"""The account: what a party has released through guards that draw noise, text by text. It is the outermost layer of guards.

A release is written to the party's journal before it leaves, so a killed run has forgotten none. A resumed run that sends the
very bytes again (same step, same rows, hence the same noise) releases nothing new and is not counted twice; where the rows came
out otherwise (the owner's answers depend on the company in its last bits), the noise is new, and so is the release. The journal
is for all runs of a party's folder: a run that is begun anew adds to what the owner saw before.

A line is in the hands of the system, not of the disk, when a release leaves: a crash of the whole machine may lose the last ones.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaloom.errors import CheckpointError
from deltaloom.files import disk_errors
from deltaloom.private.accountant import Cost, Ledger, Spent
from deltaloom.private.guards.base import CROSSINGS, Chain
from deltaloom.private.messages import Crossing, GuardContext

NAME_BYTES, DIGEST_BYTES = 8, 16
WORDS: Mapping[Crossing, str] = {"hidden": "hidden states", "gradient": "gradients at label positions"}


def text_name(ids: Sequence[int]) -> str:
    """What a text is called here: the same for the same tokens."""
    return hashlib.blake2b(torch.tensor(ids, dtype=torch.int64).numpy().tobytes(), digest_size=NAME_BYTES).hexdigest()


class Account:
    """Counts what leaves through `chain`, for one run and for all that the journal at `path` holds.

    It gives every tensor on as it is. `key`, the party's secret, keeps the journal's names of texts from being guessed.

    Raises:
        CheckpointError: the journal has entries that nobody wrote.
    """

    name: ClassVar[str] = "account"

    def __init__(self, path: Path, chain: Chain, key: bytes, run: str) -> None:
        self._path, self._key, self.run = path, key, run
        self.costs: dict[Crossing, Cost] = {crossing: chain.cost(crossing) for crossing in CROSSINGS}
        self._books = {(scope, crossing): Ledger() for scope in ("run", "folder") for crossing in CROSSINGS}
        self._digests: set[str] = set()
        self.cut_lines = 0
        """Lines that a kill cut while they were written: what they announce was never sent."""
        if path.exists():
            self._read()

    def outgoing(self, tensor: Tensor, context: GuardContext) -> Tensor:
        """Write the release down; the tensor is given on.

        Raises:
            ResourceError: there is no room on the disk; nothing may leave then. CheckpointError: whose rows these are is unknown.
        """
        cost = self.costs.get(context.crossing, Cost())
        if not cost.promised:
            return tensor
        if len(context.texts) != len(context.lengths):
            raise CheckpointError("rows are sent without the names of their texts, so that they cannot be accounted for",
                                  got=len(context.texts), legal=len(context.lengths))
        plain = tensor.detach().contiguous().cpu()
        body = hashlib.sha256(plain.view(torch.uint8).numpy().data if plain.numel() else b"").digest()
        digest = hashlib.blake2b(context.crossing.encode() + body, digest_size=DIGEST_BYTES).hexdigest()
        if digest in self._digests:
            return tensor
        texts = [[self._named(name), rows] for name, rows in zip(context.texts, context.lengths, strict=True) if rows]
        entry = {"run": self.run, "crossing": context.crossing, "cost": [cost.mu, cost.eta, cost.diameter], "digest": digest,
                 "texts": texts, "further": context.phase == "inference" and context.key.step > 0}
        self._append(json.dumps(entry))
        self._take(entry)
        return tensor

    def rows(self, delta: float) -> list[dict[str, Any]]:
        """What has been spent: for each guarded crossing one release of a row, then worst row, worst text, all rows together.

        `scope`: this run, or all runs from this folder. `unit`: "one release", "row", "text", "all rows".
        """
        found = []
        for crossing, cost in self.costs.items():
            if not cost.promised:
                continue
            once = Ledger()
            once.record(cost, {"": 1})
            found.append(_line(crossing, "run", "one release", once.per_token(delta)))
            for scope in ("run", "folder"):
                book = self._books[scope, crossing]
                found += [_line(crossing, scope, "row", book.per_token(delta)),
                          _line(crossing, scope, "text", book.per_sample(delta)),
                          _line(crossing, scope, "all rows", book.together(delta))]
        return found

    def _named(self, name: str) -> str:
        return hashlib.blake2b(name.encode(), key=self._key, digest_size=NAME_BYTES).hexdigest()

    def _take(self, entry: Mapping[str, Any]) -> None:
        mu, eta, diameter = entry["cost"]
        cost = Cost(float(mu), float(eta), None if diameter is None else float(diameter))
        scopes = ("run", "folder") if entry["run"] == self.run else ("folder",)
        for scope in scopes:
            for name, rows in entry["texts"]:
                self._books[scope, entry["crossing"]].record(cost, {str(name): int(rows)}, further=bool(entry["further"]))
        self._digests.add(str(entry["digest"]))

    def _append(self, line: str) -> None:
        """One write at the end of the file, behind a cut line on a line of its own."""
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                size = os.fstat(handle).st_size
                torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
                data = (("\n" if torn else "") + line + "\n").encode()
                while data:
                    data = data[os.write(handle, data):]
            finally:
                os.close(handle)

    def _read(self) -> None:
        lines = self._path.read_bytes().split(b"\n")
        for line in lines:
            if not line:
                continue
            try:
                entry = json.loads(line)
            except ValueError:
                self.cut_lines += 1
                continue
            try:
                self._take(entry)
            except (KeyError, TypeError, ValueError):
                raise CheckpointError("the journal of what was released has an entry that nobody wrote", got=str(self._path),
                                      hint="Put the file aside to begin a new account; what was sent before is then not in it."
                                      ) from None


def unpromised(costs: Mapping[Crossing, Cost], *, labels: str, rounds: bool, masked: bool) -> list[str]:
    """What leaves the party without any promise, in words."""
    found = []
    if not costs.get("hidden", Cost()).promised:
        found.append("hidden states at the cut: no guard draws noise on them, so nothing is promised about any token")
    if labels == "owner":
        found.append("labels: they are sent to the owner as they are; those of a language model are its text")
    elif not costs.get("gradient", Cost()).promised:
        found.append("gradients at label positions: no noise; an owner of the head reads every label off them, and those of a "
                     "language model are its text")
    if rounds:
        found.append("the update of each round: no noise" + ("; masks hide it in the sum of all" if masked else "")
                     + "; it depends on every text that was trained on")
    return found


def _line(crossing: Crossing, scope: str, unit: str, spent: Spent) -> dict[str, Any]:
    return {"crossing": WORDS[crossing], "scope": scope, "unit": unit, "releases": spent.releases, "mu": spent.mu,
            "eta": spent.eta, "epsilon": spent.epsilon}
