"""Masks: exact sums, updates that look uniform, parties that drop out at every phase, nothing revealed twice."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

pytest.importorskip("cryptography")

from deltaloom.errors import CheckpointError, DataError, RefusedError, SettingsError
from deltaloom.private.guards._fixed import decode, encode, mask
from deltaloom.private.guards._shamir import join, split
from deltaloom.private.guards.base import Answer, Roll
from deltaloom.private.guards.masks import MaskedParty, Masks

LAYOUT = {"a": (3, 4), "b": (5,)}


def update(party: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(party)
    return {name: torch.randn(shape, generator=generator) for name, shape in LAYOUT.items()}


class Run:
    """A round of parties 'p0', 'p1', ... with 10, 11, ... samples, some of which drop out after a phase."""

    def __init__(self, parties: int, guard: Masks | None = None, label: str = "r1.1") -> None:
        self.guard = guard or Masks()
        self.names = [f"p{index}" for index in range(parties)]
        self.members = {name: MaskedParty(self.guard, name, label, bytes([index]) * 32) for index, name in enumerate(self.names)}
        self.roll = Roll(label, tuple(self.names), {}, LAYOUT)

    def answer(self, phase: str, name: str) -> Answer:
        before = {"shares": "keys", "collect": "shares", "unmask": "collect"}
        told = [self.guard.told(self.roll, each, name) for each, done in before.items() if done in self.roll.answers]
        member, index = self.members[name], self.names.index(name)
        return {"keys": lambda: member.keys(), "shares": lambda: member.shares(told[0]),
                "collect": lambda: member.masked(told[0], told[1], update(index), 10 + index),
                "unmask": lambda: member.unmask(told[0], told[1], told[2])}[phase]()

    def play(self, gone: dict[str, str] | None = None, until: str = "unmask") -> dict[str, torch.Tensor]:
        """`gone`: party -> the first phase that it does not answer."""
        alive = list(self.names)
        for phase in self.guard.phases:
            alive = [name for name in alive if (gone or {}).get(name) != phase]
            answers = {name: self.answer(phase, name) for name in alive}
            for name, answer in answers.items():
                self.guard.check(self.roll, phase, name, answer)
            self.roll = Roll(self.roll.label, self.roll.parties, {**self.roll.answers, phase: answers}, LAYOUT)
            if phase == until and until != "unmask":
                return {}
        return self.guard.mean(self.roll)


def written_out(parties: list[int], fraction: int = 24) -> dict[str, torch.Tensor]:
    total = sum(10 + party for party in parties)
    return {name: sum((update(party)[name].double() * (10 + party) * 2**fraction).round() for party in parties)
            / 2.0**fraction / total for name in LAYOUT}


@pytest.mark.parametrize("parties", (2, 3, 5))
def test_masks_cancel_exactly(parties):
    mean = Run(parties).play()
    for name, value in written_out(list(range(parties))).items():
        assert torch.equal(mean[name], value)
        plain = sum(update(p)[name].double() * (10 + p) for p in range(parties)) / sum(10 + p for p in range(parties))
        assert float((mean[name] - plain).abs().max()) <= parties * 2**-25 / (10 * parties)


@pytest.mark.parametrize("phase", Masks.phases)
@pytest.mark.parametrize("who", (0, 2, 4))
def test_a_party_that_drops_out_is_recovered_from(phase, who):
    mean = Run(5).play({f"p{who}": phase})
    counted = [party for party in range(5) if party != who or phase == "unmask"]  # its update had arrived
    for name, value in written_out(counted).items():
        assert torch.equal(mean[name], value)


def test_two_may_drop_out_in_different_phases():
    mean = Run(5).play({"p1": "collect", "p3": "unmask"})
    assert torch.equal(mean["a"], written_out([0, 2, 3, 4])["a"])


def test_too_few_left_is_refused_before_anything_is_revealed():
    run = Run(4)
    with pytest.raises(RefusedError, match="too few"):
        run.play({"p0": "collect", "p1": "collect"})
    assert run.members["p2"].state_dict()["revealed"] is None
    with pytest.raises(SettingsError):
        Masks(threshold=3).needed(2)
    with pytest.raises(SettingsError):
        Masks().needed(1)


def test_a_single_update_looks_uniform():
    """Of one and the same update, under many labels: every masked number is uniform modulo 2^64, whatever the update is."""
    seen = []
    for label in range(150):
        run = Run(2, label=str(label))
        run.play(until="collect")
        seen.append(run.roll.answers["collect"]["p0"].tensors["masked"].numpy().view(np.uint64))
    share = np.stack(seen).astype(np.float64) / 2.0**64
    assert stats.kstest(share.flatten(), "uniform").pvalue > 0.01
    for column in range(share.shape[1]):
        assert stats.kstest(share[:, column], "uniform").pvalue > 1e-4


def test_other_rosters_attempts_and_parties_have_other_masks():
    first, other, again = Run(3), Run(3, label="r1.2"), Run(3)
    bigger = Run(4)
    for run in (first, other, again, bigger):
        run.play(until="collect")
    vectors = [run.roll.answers["collect"]["p0"].tensors["masked"] for run in (first, other, bigger)]
    for one, two in itertools.combinations(vectors, 2):
        assert not bool((one == two).any())
    assert torch.equal(vectors[0], again.roll.answers["collect"]["p0"].tensors["masked"])  # a restarted party repeats itself


def test_a_party_neither_sends_nor_reveals_twice():
    run = Run(3)
    run.play()
    told = [run.guard.told(run.roll, phase, "p0") for phase in ("shares", "collect", "unmask")]
    restarted = MaskedParty(run.guard, "p0", "r1.1", bytes(32))
    restarted.load_state_dict(run.members["p0"].state_dict())
    for member in (run.members["p0"], restarted):
        again = member.masked(told[0], told[1], update(0), 10)
        assert torch.equal(again.tensors["masked"], run.roll.answers["collect"]["p0"].tensors["masked"])
        with pytest.raises(RefusedError, match="two under one mask"):
            member.masked(told[0], told[1], update(1), 10)
        with pytest.raises(RefusedError, match="both of one party"):
            member.unmask(told[0], told[1], {name: told[2][name] for name in ("p0", "p1")})
    with pytest.raises(CheckpointError):
        restarted.load_state_dict({"label": "r2.1", "sent": None, "revealed": None})


def test_the_coordinator_cannot_read_or_swap_sealed_shares():
    run = Run(3)
    run.play(until="collect")
    shares = run.guard.told(run.roll, "collect", "p0")
    changed = {name: tensor ^ 1 for name, tensor in shares.items()}
    swapped = {"p1": shares["p2"], "p2": shares["p1"]}
    keys = run.guard.told(run.roll, "shares", "p0")
    alive = dict.fromkeys(run.names, torch.zeros(0, dtype=torch.uint8))
    for bad in (changed, swapped):
        with pytest.raises(DataError, match="changed on the way"):
            MaskedParty(run.guard, "p0", "r1.1", bytes(32)).unmask(keys, bad, alive)


def test_malformed_answers_are_refused():
    run = Run(3)
    run.play(until="collect")
    good = {phase: run.roll.answers[phase]["p0"] for phase in ("keys", "shares", "collect")}
    for phase, answer in good.items():
        tensors = dict(answer.tensors)
        name = next(iter(tensors))
        changed = (tensors[name][:-1], tensors[name].float(), tensors[name][None])
        bad = [{}, {**tensors, "more": tensors[name]}, *({**tensors, name: tensor} for tensor in changed)]
        for each in bad:
            with pytest.raises(DataError):
                run.guard.check(run.roll, phase, "p0", Answer(each))
        with pytest.raises(DataError):
            run.guard.check(run.roll, phase, "p0", Answer(tensors, count=3))


def test_keys_that_are_not_sound_are_refused():
    run = Run(3)
    run.play(until="keys")
    keys = run.guard.told(run.roll, "shares", "p0")
    zero = {name: torch.zeros(32, dtype=torch.uint8) if name == "p1/sealing" else tensor for name, tensor in keys.items()}
    with pytest.raises(DataError, match="not usable"):
        run.members["p0"].shares(zero)
    others = {name: tensor for name, tensor in keys.items() if "p0" not in name}
    for bad in ({}, others, {**keys, "p9/sealing": keys["p0/sealing"]}, {**keys, "p0/masking": keys["p1/masking"]}):
        with pytest.raises(DataError):
            run.members["p0"].shares(bad)


def test_values_that_could_wrap_around_are_refused():
    for bad in (1e9, float("nan"), float("inf")):
        with pytest.raises(RefusedError, match="too large"):
            encode({"a": torch.tensor([bad])}, 1000, 24, 3)


@given(st.integers(1, 6), st.data())
@settings(max_examples=25, deadline=None)
def test_shares_give_the_secret(threshold, data):
    points = data.draw(st.integers(threshold, 8))
    secret = data.draw(st.binary(min_size=32, max_size=32))
    shares = split(secret, threshold, points, b"r")
    chosen = data.draw(st.permutations(range(points)))[:threshold]
    assert join({index + 1: shares[index] for index in chosen}) == secret


def test_fewer_shares_say_nothing():
    """For any wrong secret there is a polynomial through the same shares: two shares of three are joined to garbage."""
    shares = split(bytes(32), 3, 5, b"r")
    with pytest.raises(DataError):
        join({1: shares[0], 2: shares[1]})


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=5), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_fixed_point_sums_are_exact_in_any_order(counts, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = [encode({"a": torch.randn(7, generator=generator)}, count, 20, len(counts)) for count in counts]
    pads = [mask(bytes([index]), 8) for index in range(len(counts))]
    masked = sum((v + p for v, p in zip(vectors, pads, strict=True)), np.zeros(8, np.uint64))
    assert np.array_equal(masked - sum(pads[::-1], np.zeros(8, np.uint64)), sum(vectors[::-1], np.zeros(8, np.uint64)))
    assert decode(sum(vectors, np.zeros(8, np.uint64)), {"a": (7,)}, 20)[1] == sum(counts)
