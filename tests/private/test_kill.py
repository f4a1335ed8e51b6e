"""kill -9 of the owner and of a party at random points of tuning, joint rounds and inference: nothing is lost, no bit differs."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from deltaloom.jobs import owner as owner_jobs
from deltaloom.jobs import party as party_jobs
from deltaloom.jobs.party import PartyState, connect, member
from deltaloom.jobs.runfile import read_run_file
from deltaloom.jobs.serve import Rounds, methods_of
from deltaloom.private.joining import Participant
from deltaloom.private.process import shared_environment
from deltaloom.private.settings import parse_private
from deltaloom.train.checkpoints import LEFTOVER
from tests.cli.private_flow import delta_of, emulator_of, rows_of, run_file, toy_model
from tests.jobs.small import write_rows
from tests.private.killed import Killable, KillableOwner, predict, tune

pytestmark = pytest.mark.timeout(1200)
QUIET = {"say": lambda text: None}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    with pytest.MonkeyPatch.context() as patch:  # what the fork server, and so every process, is started with
        for name, value in shared_environment({}).items():
            patch.setenv(name, value)
        toy_model(folder / "model")
        emulator_of(folder / "model", folder / "emulator")
        yield folder


def owner_of(folder: Path, place: Path, rounds: Rounds | None = None) -> KillableOwner:
    folder.mkdir()
    owner_jobs.init(folder / "owner", "acme", cut=1)
    return KillableOwner(folder / "owner", place / "model", rounds)


def joined(owner: KillableOwner, folder: Path, name: str = "a") -> Path:
    invite = folder / f"{name}.invite"
    owner_jobs.invite(owner.folder, name, invite, address=owner.address)
    party_jobs.join(invite, folder / name, **QUIET)
    return folder / name


def last_step(party: Path) -> int | None:
    """The newest step of a party's run."""
    path = party / "tuned" / "events.jsonl"
    if not path.exists():
        return None
    for line in reversed(path.read_bytes().split(b"\n")):
        if b'"Step"' in line:
            return int(json.loads(line)["step"])
    return 0


def pause(chance: random.Random, party: Path, running: Killable) -> None:
    """Until a random point: while something starts, or a few steps later, within a step, an evaluation or a save."""
    if chance.random() < 0.3:
        time.sleep(chance.random())
        return
    for _ in range(chance.randint(1, 2)):
        before = last_step(party)
        until = time.monotonic() + 60
        while last_step(party) == before and running.running and time.monotonic() < until:
            time.sleep(0.005)
    time.sleep(chance.random() * 0.06)


def kill_often(chance: random.Random, kills: int, owner: KillableOwner, party: Killable, folder: Path) -> None:
    """Each of the two killed so many times, in random order; the run has to be long enough for that."""
    victims = ["owner", "party"] * kills
    chance.shuffle(victims)
    for victim in victims:
        pause(chance, folder, party)
        assert party.running, f"the run was too short, or failed: {party.log.read_text()[-2000:]}"
        hit = owner if victim == "owner" else party
        hit.kill()
        hit.start()


def assert_whole(folder: Path) -> None:
    """Every file under its own name is whole, and no kill left half ones behind that somebody could take for real."""
    for path in folder.rglob("*"):
        if not path.is_file() or path.name.startswith(".") or any(LEFTOVER.fullmatch(part) for part in path.parts):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines()), path
        elif path.suffix == ".safetensors":
            safetensors.torch.load_file(path)


def assert_end(owner: KillableOwner, party: Path) -> None:
    """The audit chain holds, and no file is half-written."""
    assert owner_jobs.audit(owner.folder)["lines"] > 10
    assert_whole(owner.folder)
    assert_whole(party)


def tuned(folder: Path, place: Path, run: Path, kills: int, seed: int) -> bytes:
    """The delta of a run in which both were killed so many times."""
    with owner_of(folder, place) as owner:
        party = joined(owner, folder)
        with Killable(folder / "party.log", tune, party, run) as tuning:
            kill_often(random.Random(seed), kills, owner, tuning, party)
            tuning.finish()
        owner.kill()
        assert_end(owner, party)
    return delta_of(party)


def assert_tuning_survives(tmp_path: Path, place: Path, kills: int, steps: int, seed: int) -> None:
    run = run_file(tmp_path / "data", place / "emulator", max_steps=steps, save_every=2, eval_every=5)
    assert tuned(tmp_path / "killed", place, run, kills, seed) == tuned(tmp_path / "whole", place, run, 0, seed)


@pytest.mark.slow
def test_twenty_kills_each_in_split_tuning_change_no_bit(tmp_path, place):
    assert_tuning_survives(tmp_path, place, 20, 160, seed=3)


class Companion(threading.Thread):
    """Another party of the rounds, in this process: its values depend on the round and the common values alone."""

    def __init__(self, folder: Path, run: Path) -> None:
        super().__init__(daemon=True)
        file = read_run_file(run).file
        self.folder, self.settings = folder, parse_private(file.private)
        self.methods = methods_of(run)
        self.common: dict[str, torch.Tensor] = {}

    def run(self) -> None:
        state = PartyState(self.folder / "state")
        wire = connect(member(self.folder), self.settings, run=state.run_name("tuned"), purpose="rounds", methods=self.methods)
        (self.folder / "rounds").mkdir()
        someone = Participant("b", self.folder / "rounds", lambda request: wire.submit(request).result(), self.train,
                              wait=lambda stand: time.sleep(0.05))
        self.common = dict(someone.run())
        wire.close()

    def train(self, number, common):
        generator = torch.Generator().manual_seed(number)
        return {name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) for name, tensor in common.items()}, 5


def in_rounds(folder: Path, place: Path, run: Path, kills: int, seed: int, rounds: int) -> bytes:
    held = Rounds(rounds=rounds, parties=2, deltas=run)
    with owner_of(folder, place, held) as owner:
        party, other = joined(owner, folder), joined(owner, folder, "b")
        companion = Companion(other, run)
        companion.start()
        with Killable(folder / "party.log", tune, party, run) as tuning:
            kill_often(random.Random(seed), kills, owner, tuning, party)
            tuning.finish()
        companion.join(60)
        owner.kill()
        assert_end(owner, party)
    end = safetensors.torch.load_file(party / "tuned" / "delta" / "delta.safetensors")
    assert len(end) == len(companion.common) > 0
    assert all(any(torch.equal(one, other) for other in companion.common.values()) for one in end.values())
    return delta_of(party)


@pytest.mark.slow
def test_twenty_kills_each_in_joint_rounds_change_no_bit(tmp_path, place):
    run = run_file(tmp_path / "data", place / "emulator", max_steps=60, save_every=2, eval_every=5)
    killed, whole = (in_rounds(tmp_path / f"{kills}", place, run, kills, 4, rounds=3) for kills in (20, 0))
    assert killed == whole


@pytest.mark.slow
def test_twenty_kills_each_in_inference_change_no_token(tmp_path, place):
    run = run_file(tmp_path / "data", place / "emulator", max_steps=4)
    chance, folder = random.Random(5), tmp_path / "x"
    with owner_of(folder, place) as owner:
        party = joined(owner, folder)
        with Killable(folder / "party.log", tune, party, run) as tuning:
            tuning.finish()
        data, whole, output = tmp_path / "new.jsonl", tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
        write_rows(data, [{"prompt": row["prompt"]} for row in rows_of(24)])
        with Killable(folder / "predict.log", predict, party, data, whole) as writing:
            writing.finish()
        killed = {"owner": 0, "party": 0}
        writing = Killable(folder / "predict.log", predict, party, data, output)
        while min(killed.values()) < 20:
            output.unlink(missing_ok=True)
            with writing:
                while writing.running and min(killed.values()) < 20:
                    time.sleep(0.1 + chance.random())
                    victim = "owner" if killed["owner"] <= killed["party"] else "party"
                    if not writing.running:
                        break
                    hit = owner if victim == "owner" else writing
                    hit.kill()
                    killed[victim] += 1
                    assert not output.exists() or output.read_bytes() == whole.read_bytes()
                    hit.start()
                writing.finish()
            assert output.read_bytes() == whole.read_bytes()
        owner.kill()
        assert_end(owner, party)


@pytest.mark.slow
def test_kills_at_places_that_are_hard_to_hit_lose_nothing(tmp_path, place):
    """After a run's first file, and between its figures and its pages; and once anywhere."""
    run = run_file(tmp_path / "data", place / "emulator", max_steps=8, save_every=2)
    with owner_of(tmp_path / "x", place) as owner:
        party, found = joined(owner, tmp_path / "x"), {}
        (party / "tuned").mkdir()
        (party / "tuned" / "events.jsonl").touch()
        (party / "tuned" / ".run.yaml.x.part").write_text("model: ")
        for kills in (1, 0):
            with Killable(tmp_path / "party.log", tune, party, run, not kills) as tuning:
                kill_often(random.Random(1), kills, owner, tuning, party)
                tuning.finish()
            assert_end(owner, party)
            found[kills] = delta_of(party)
        (party / "tuned" / "report.html").unlink()
        with Killable(tmp_path / "party.log", tune, party, run) as tuning:
            tuning.finish()
        owner.kill()
    assert found[0] == found[1] == delta_of(party) and (party / "tuned" / "report.html").exists()
