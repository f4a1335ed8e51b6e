"""Masks: the coordinator learns the sum of the parties' updates and nothing about a single one.

Bonawitz et al. 2017 (CCS, "Practical secure aggregation for privacy-preserving machine learning"), figure 4, in its
honest-but-curious form: without signatures and the consistency check, which certificates of the wire and a trusted roster
stand in for only as long as the coordinator does not lie about who is alive. In four phases:

    keys      each party u sends two public keys, one for sealing, one for masks
    shares    u draws a seed b_u, splits b_u and its mask key by Shamir into one share for each party, seals each for its reader
    collect   u sends  y_u = n_u x_u + PRG(b_u) + sum over v > u of PRG(s_uv) - sum over v < u of PRG(s_uv)   modulo 2^64
    unmask    who is still there reveals, of each party that answered `collect`, its share of b; of each that dropped out
              after `shares`, its share of the mask key; never both of one party

s_uv is agreed by X25519, n_u x_u is fixed-point with n_u itself as a further number, so that counts stay hidden too. Every
draw follows from the party's secret, the round's label and the roster: a restarted party repeats itself bit for bit, and
another roster or attempt means other masks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from deltaloom.errors import CheckpointError, DataError, RefusedError, SettingsError
from deltaloom.private.guards._exchange import agree, derive, public_of, seal, unseal
from deltaloom.private.guards._fixed import decode, encode, length_of, mask
from deltaloom.private.guards._shamir import SHARE_BYTES, join, split
from deltaloom.private.guards.base import Answer, PartyHalf, Roll, UpdateGuard

PUBLIC = 32
SEALED = 2 * SHARE_BYTES + 16
KEYS, SHARES, COLLECT, UNMASK = "keys", "shares", "collect", "unmask"


class Masks(UpdateGuard):
    """Pairwise masks with recovery of parties that drop out.

    Protects a party's single update and its number of samples from the coordinator, and from the other parties, as long as
    fewer than `threshold` of them pool what they hold. Leaves the sum and the common prefix, which everybody learns; with two
    parties each can subtract its own from the sum. A coordinator that lies about who dropped out is not covered. Norm bounds
    and robust means need single updates, so they cannot be had together with masks.
    """

    name: ClassVar[str] = "masks"
    protects: ClassVar[str] = "Each party's own update and its samples' number, from the coordinator and too few other parties."
    leaves: ClassVar[str] = ("The sum and the common prefix; with two parties each learns the other's by subtraction; a "
                             "coordinator that lies about who dropped out.")
    phases: ClassVar[tuple[str, ...]] = (KEYS, SHARES, COLLECT, UNMASK)

    threshold: int | None = Field(default=None, ge=2)
    """Parties that must still be there at the end, and that together could unmask one; by default more than half, at least 2."""
    fraction: int = Field(default=24, ge=1, le=40)
    """Binary digits after the point: a weighted mean is off by at most parties x 2^-(fraction + 1) / samples."""

    def needed(self, parties: int) -> int:
        """The threshold; a sum of one update would be that update.

        Raises:
            SettingsError: there are not as many parties.
        """
        needed = self.threshold or max(2, parties // 2 + 1)
        if needed > parties:
            raise SettingsError("masks need more parties", got=parties, legal=f"at least {needed}")
        return needed

    # The coordinator's half: pure functions of what was answered.

    def check(self, roll: Roll, phase: str, party: str, answer: Answer) -> None:
        """Names, types and sizes of an answer.

        Raises:
            DataError: they are not those of the phase.
        """
        readers = set(roll.answers.get(KEYS, {}))
        wanted: dict[str, tuple[torch.dtype, int]]
        if phase == KEYS:
            wanted = {"sealing": (torch.uint8, PUBLIC), "masking": (torch.uint8, PUBLIC)}
        elif phase == SHARES:
            wanted = dict.fromkeys(readers - {party}, (torch.uint8, SEALED))
        elif phase == COLLECT:
            wanted = {"masked": (torch.int64, length_of(roll.layout))}
        else:
            wanted = dict.fromkeys(roll.answers[SHARES], (torch.uint8, SHARE_BYTES))
        got = {name: (tensor.dtype, tensor.numel()) for name, tensor in answer.tensors.items()}
        if got != wanted or any(tensor.ndim != 1 for tensor in answer.tensors.values()):
            raise DataError(f"the answer to phase '{phase}' of masks is malformed", got=sorted(map(str, got.items())),
                            legal=sorted(map(str, wanted.items())))
        if answer.count:
            raise DataError("with masks the number of samples is inside the masked update", got=answer.count, legal=0)

    def told(self, roll: Roll, phase: str, party: str) -> dict[str, Tensor]:
        """What a party needs for a phase: all public keys; what was sealed for it; who answered."""
        if phase == SHARES:
            return {f"{other}/{kind}": tensor for other, answer in sorted(roll.answers[KEYS].items())
                    for kind, tensor in sorted(answer.tensors.items())}
        if phase == COLLECT:
            return {other: answer.tensors[party] for other, answer in sorted(roll.answers[SHARES].items()) if other != party}
        if phase == UNMASK:
            return {other: torch.zeros(0, dtype=torch.uint8) for other in sorted(roll.answers[COLLECT])}
        return {}

    def mean(self, roll: Roll) -> dict[str, Tensor]:
        """The weighted mean of those who answered `collect`.

        Raises:
            DataError: shares do not fit, or nobody used a sample.
        """
        keys = {party: _bytes(answer.tensors["masking"]) for party, answer in roll.answers[KEYS].items()}
        transcript = _transcript(roll.label, {party: {kind: _bytes(t) for kind, t in answer.tensors.items()}
                                              for party, answer in roll.answers[KEYS].items()})
        masked, sharing = roll.answers[COLLECT], set(roll.answers[SHARES])
        points = {party: index + 1 for index, party in enumerate(sorted(keys))}
        length = length_of(roll.layout)
        total = np.zeros(length, np.uint64)
        for answer in masked.values():
            total += answer.tensors["masked"].numpy().view(np.uint64)
        for owner in sorted(sharing):
            secret = join({points[party]: _bytes(answer.tensors[owner]) for party, answer in roll.answers[UNMASK].items()})
            if owner in masked:
                total -= mask(secret, length)
                continue
            if public_of(secret) != keys[owner]:
                raise DataError("the shares of a dropped party's key do not give that key", got=owner,
                                hint="Start the round again.")
            for other in masked:  # undo what each survivor added for the dropped one
                total -= _pairwise(secret, keys[other], transcript, length, other, owner)
        mean, count = decode(total, roll.layout, self.fraction)
        if count <= 0:
            raise DataError("the parties of this round used no samples", got=count)
        return mean

    def half(self, party: str, label: str, secret: bytes) -> MaskedParty:
        """The party's half."""
        return MaskedParty(self, party, label, secret)


class MaskedParty(PartyHalf):
    """A party's half. Its answers depend on nothing but what is passed in, except that it reveals and sends once.

    Keep `state_dict()` on disk before an answer is sent: a party that forgot what it sent or revealed could be made to send
    two updates under one mask, or to reveal both secrets of another one.
    """

    def __init__(self, settings: Masks, name: str, label: str, secret: bytes) -> None:
        """`secret`: 32 bytes that stay at the party; `label`: of the round and attempt."""
        self._settings, self.name, self._label = settings, name, label
        self._sealing = derive(secret, "sealing", name, label)
        self._masking = derive(secret, "masking", name, label)
        self._secret = derive(secret, "seed", name, label)
        self._sent: str | None = None
        self._revealed: tuple[str, ...] | None = None

    def answer(self, phase: str, told: Mapping[str, Mapping[str, Tensor]], tensors: Mapping[str, Tensor], count: int) -> Answer:
        """The answer to a phase.

        Raises:
            DataError: no such phase, or what was told is malformed. RefusedError: as the phases say.
        """
        answers: dict[str, Callable[[], Answer]] = {
            KEYS: self.keys, SHARES: lambda: self.shares(told[SHARES]),
            COLLECT: lambda: self.masked(told[SHARES], told[COLLECT], tensors, count),
            UNMASK: lambda: self.unmask(told[SHARES], told[COLLECT], told[UNMASK])}
        if phase not in answers:
            raise DataError("masks have no such phase", got=phase, legal=Masks.phases)
        return answers[phase]()

    def keys(self) -> Answer:
        """Both public keys."""
        return Answer({"sealing": _tensor(public_of(self._sealing)), "masking": _tensor(public_of(self._masking))})

    def shares(self, told: Mapping[str, Tensor]) -> Answer:
        """One sealed pair of shares for each other party.

        Raises:
            DataError: the keys that were told are malformed, or this party's own are not among them.
        """
        keys, transcript = self._keys(told)
        parties = sorted(keys)
        threshold = self._settings.needed(len(parties))
        of_seed = split(self._seed(transcript), threshold, len(parties), derive(self._secret, "seed shares", transcript))
        of_key = split(self._masking, threshold, len(parties), derive(self._secret, "key shares", transcript))
        return Answer({reader: _tensor(seal(self._channel(keys, transcript, self.name, reader), a + b))
                       for reader, a, b in zip(parties, of_seed, of_key, strict=True) if reader != self.name})

    def masked(self, told_keys: Mapping[str, Tensor], told_shares: Mapping[str, Tensor], tensors: Mapping[str, Tensor],
               count: int) -> Answer:
        """The masked update; `told_shares` says who shared, which are those that masks are exchanged with.

        Raises:
            RefusedError: another update was masked in this round already, too few parties are there, or values are too large.
        """
        keys, transcript = self._keys(told_keys)
        if count < 1:
            raise DataError("an update needs samples", got=count, legal="at least 1")
        peers = sorted(set(told_shares) & set(keys) - {self.name})
        if len(peers) + 1 < self._settings.needed(len(keys)):
            raise RefusedError("too few parties are left to mask an update", got=len(peers) + 1)
        body = encode(tensors, count, self._settings.fraction, len(keys))
        total = body + mask(self._seed(transcript), len(body))
        for peer in peers:
            total += _pairwise(self._masking, keys[peer]["masking"], transcript, len(body), self.name, peer)
        digest = hashlib.sha256(transcript + repr(peers).encode() + body.tobytes()).hexdigest()
        if self._sent not in (None, digest):
            raise RefusedError("another update was sent in this round already: two under one mask would show their difference",
                               hint="Send the first one again, or wait for the next round.")
        self._sent = digest
        return Answer({"masked": torch.from_numpy(total.view(np.int64))})

    def unmask(self, told_keys: Mapping[str, Tensor], told_shares: Mapping[str, Tensor],
               survivors: Mapping[str, Tensor]) -> Answer:
        """For each party that shared: its seed's share if it answered, its mask key's share if not.

        Raises:
            RefusedError: fewer answered than the threshold, or this party revealed other shares in this round already.
        """
        keys, transcript = self._keys(told_keys)
        alive = tuple(sorted(set(survivors) & (set(told_shares) | {self.name})))
        if len(alive) < self._settings.needed(len(keys)) or self.name not in alive:
            raise RefusedError("too few parties answered to unmask their sum", got=alive)
        if self._revealed not in (None, alive):
            raise RefusedError("other shares were revealed in this round already: both of one party would unmask it", got=alive)
        self._revealed = alive
        parties = sorted(keys)
        threshold, mine = self._settings.needed(len(parties)), parties.index(self.name)
        own = split(self._seed(transcript), threshold, len(parties), derive(self._secret, "seed shares", transcript))[mine]
        revealed = {self.name: own}
        for other, sealed in told_shares.items():
            pair = unseal(self._channel(keys, transcript, other, self.name), _bytes(sealed))
            revealed[other] = pair[:SHARE_BYTES] if other in alive else pair[SHARE_BYTES:]
        return Answer({other: _tensor(share) for other, share in revealed.items()})

    def state_dict(self) -> dict[str, Any]:
        """Digest of what was sent, and who was named alive: plain JSON values, no secrets."""
        return {"label": self._label, "sent": self._sent, "revealed": self._revealed and list(self._revealed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave, of the same round.

        Raises:
            CheckpointError: it is of another round.
        """
        if state.get("label") != self._label:
            raise CheckpointError("this state of masks is of another round", got=state.get("label"), legal=self._label)
        self._sent, revealed = state["sent"], state["revealed"]
        self._revealed = None if revealed is None else tuple(revealed)

    def _seed(self, transcript: bytes) -> bytes:
        return derive(self._secret, "own mask", transcript)

    def _keys(self, told: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, bytes]], bytes]:
        keys: dict[str, dict[str, bytes]] = {}
        for name, tensor in told.items():
            party, _, kind = name.rpartition("/")
            keys.setdefault(party, {})[kind] = _bytes(tensor)
        own = {kind: _bytes(tensor) for kind, tensor in self.keys().tensors.items()}
        sound = all(set(pair) == set(own) and all(len(key) == PUBLIC for key in pair.values()) for pair in keys.values())
        if not sound or keys.get(self.name) != own:
            raise DataError("the public keys of this round are malformed, or this party's own are not among them",
                            got=sorted(keys), hint="Start the round again.")
        return keys, _transcript(self._label, keys)

    def _channel(self, keys: Mapping[str, Mapping[str, bytes]], transcript: bytes, sender: str, reader: str) -> bytes:
        other = reader if sender == self.name else sender
        return agree(self._sealing, keys[other]["sealing"], _info("seal", transcript, sender, reader))


def _pairwise(private: bytes, public: bytes, transcript: bytes, length: int, mine: str, other: str) -> np.ndarray:
    """What `mine` adds because of `other`: the negative of what `other` adds because of `mine`."""
    low, high = sorted((mine, other))
    drawn = mask(agree(private, public, _info("mask", transcript, low, high)), length)
    return drawn if mine == low else np.negative(drawn)


def _transcript(label: str, keys: Mapping[str, Mapping[str, bytes]]) -> bytes:
    listed = [label.encode()]
    for party in sorted(keys):
        listed += [party.encode(), keys[party]["sealing"], keys[party]["masking"]]
    return hashlib.sha256(b"".join(len(part).to_bytes(4, "big") + part for part in listed)).digest()


def _info(purpose: str, transcript: bytes, *parties: str) -> bytes:
    return derive(transcript, purpose, *parties)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
