"""The commands of private tuning from end to end: real processes, a toy model, mutual TLS on loopback."""

import json
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from deltaloom.checkpoint import native
from deltaloom.private import client
from deltaloom.private.coordinating import DurableRounds
from deltaloom.private.mailbox import carry
from deltaloom.private.means.weighted import Weighted
from deltaloom.private.round_messages import StandRequest
from deltaloom.private.rounds import Coordinator, RoundSettings
from deltaloom.private.wire.convert import encode_message
from tests.cli.private_flow import CANARY, PREFIX, Owner, Process, delta_of, emulator_of, rows_of, run_file, toy_model, wait_for
from tests.jobs.small import NO_DROP, WIDTH, records, write_rows, write_run
from tests.toy_tokenizers import word_piece

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("private")
    toy_model(folder / "model")
    emulator_of(folder / "model", folder / "emulator")
    return folder


def joined(command, owner, tmp_path, name="a"):
    invite = tmp_path / f"{name}.invite"
    command.json("owner", "invite", owner, "--party", name, "-o", invite)
    command.json("party", "join", invite, "-o", tmp_path / name)
    return tmp_path / name


@pytest.fixture
def frames(monkeypatch):
    """The bytes of every frame that a party of this process sends."""
    sent = []

    def encode(message, **how):
        sent.append(encode_message(message, **how))
        return sent[-1]

    monkeypatch.setattr(client, "encode_message", encode)
    return sent


def test_the_whole_flow(command, frames, place, tmp_path):
    owner = tmp_path / "owner"
    assert command.json("owner", "init", owner, "--name", "acme", "--cut", "1")["cut"] == 1
    run = run_file(tmp_path / "data", place / "emulator", secret=True)
    with Owner(owner, place / "model") as serving:
        party = joined(command, owner, tmp_path)
        emulated = command.json("party", "emulate", party, run)
        assert emulated["metrics"]["loss"] < emulated["base_metrics"]["loss"]
        tuned = command.json("party", "tune", party, run)
        assert tuned["metrics"]["loss"] < tuned["base_metrics"]["loss"]
        assert tuned["private"]["up"] > 0 and tuned["private"]["samples"] == 32
        assert tuned["privacy"]["promised"] is False and "no guard draws noise" in tuned["privacy"]["unpromised"][0]
        assert "<b>Nothing is promised</b>" in (party / "tuned" / "report.html").read_text()
        assert "--overwrite" in command.refused("party", "tune", party, run)
        own = command.json("party", "tune", party, run, "--personal")
        assert own["metrics"]["loss"] < tuned["metrics"]["loss"]
        write_rows(tmp_path / "new.jsonl", [{"prompt": row["prompt"]} for row in rows_of(3)])
        assert command.json("party", "predict", party, "--data", tmp_path / "new.jsonl", "-o", tmp_path / "out.jsonl",
                            "--max-new-tokens", "6")["rows"] == 3
        lines = (tmp_path / "out.jsonl").read_text().splitlines()
        assert [set(json.loads(line)) for line in lines] == 3 * [{"row", "where", "text"}]
        said = command("party", "chat", party, "--max-new-tokens", "4", stdin="hello\n\n")
        assert said.code == 0 and said.out.count("\n") >= 2, said.err
        status = command.json("owner", "status", owner)
        assert status["running"] and status["address"] == serving.address
        assert [(one["party"], one["state"]) for one in status["parties"]] == [("a", "enrolled")]
        assert status["parties"][0]["bytes"] >= tuned["private"]["up"] + tuned["private"]["down"]
        assert command.json("owner", "revoke", owner, "--party", "a")["revoked"] > 0
        late = ("party", "predict", party, "--data", tmp_path / "new.jsonl", "-o", tmp_path / "no.jsonl")
        assert "revoked" in command.refused(*late, code=1)
        assert not (tmp_path / "no.jsonl").exists()
        assert serving.stop() == 0
    found = command.json("owner", "audit", owner)
    assert {"invited", "enrolled", "connected", "revoked"} <= {one["what"] for one in found["did"]}
    for path in [*owner.rglob("*"), tmp_path / "owner.log"]:
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path
    assert len(frames) > 40 and not any(CANARY.encode() in frame for frame in frames)
    secrets = [path for folder in (owner, party) for path in folder.rglob("*") if path.suffix == ".key"]
    assert len(secrets) == 2 and all(path.stat().st_mode & 0o077 == 0 for path in [*secrets, owner, party])
    lines = (owner / "audit.jsonl").read_text().splitlines()
    (owner / "audit.jsonl").write_text("\n".join([*lines[:2], *lines[3:]]) + "\n")
    assert "line 3" in command.refused("owner", "audit", owner, code=command("owner", "audit", owner).code)
    assert delta_of(party) != delta_of(party, "emulated")


def steps_of(party):
    """Training steps in a party's event file."""
    path = party / "tuned" / "events.jsonl"
    return path.read_text().count('"event": "Step"') if path.exists() else 0


def reached(party, steps):
    return steps_of(party) >= steps


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [0, 2])
def test_owner_and_party_are_killed_and_nothing_is_lost(command, place, tmp_path, rounds):
    run = run_file(tmp_path / "data", place / "emulator", max_steps=24, save_every=2, eval_every=1)
    more = ("--rounds", rounds, "--parties-per-round", 1, "--deltas", run) if rounds else ()
    found = {}
    for name, kills in (("whole", False), ("killed", True)):
        folder = tmp_path / name
        folder.mkdir()
        owner = folder / "owner"
        command.json("owner", "init", owner, "--name", "acme")
        with Owner(owner, place / "model", "127.0.0.1:0", *more) as serving:
            party = joined(command, owner, folder)
            tuning = Process(folder / "party.log", "party", "tune", party, run, "--json")
            if kills:
                wait_for(partial(reached, party, 7), tuning)
                tuning.kill()
                assert 7 <= steps_of(party) < 24
                tuning = Process(folder / "party.log", "party", "tune", party, run, "--json")
                wait_for(partial(reached, party, 14), tuning)
                serving.kill()
                assert tuning.process.poll() is None
                with Owner(owner, place / "model", serving.address, *more):
                    tuning.wait()
            else:
                tuning.wait()
        assert steps_of(party) == 24 * max(1, rounds)
        found[name] = delta_of(party)
        assert command.json("owner", "audit", owner)["lines"] > 24
    assert found["whole"] == found["killed"]


@pytest.mark.slow
def test_two_parties_in_joint_rounds_end_with_the_same_prefix(command, place, tmp_path):
    runs = {name: run_file(tmp_path / f"{name}-data", place / "emulator", count=count, word=word)
            for name, count, word in (("a", 16, "good"), ("b", 8, "bad"))}
    owner = tmp_path / "owner"
    command.json("owner", "init", owner, "--name", "acme")
    with Owner(owner, place / "model", "127.0.0.1:0", "--rounds", 2, "--deltas", runs["a"]):
        parties = {name: joined(command, owner, tmp_path, name) for name in runs}
        command.json("party", "emulate", parties["a"], runs["a"])
        tuning = [Process(tmp_path / f"{name}.log", "party", "tune", parties[name], run, "--json") for name, run in runs.items()]
        for one in tuning:
            one.wait()
        status = command.json("owner", "status", owner)
    assert status["rounds"] == 3  # the first joins what was tuned on the emulators
    assert delta_of(parties["a"]) == delta_of(parties["b"])
    facts = [json.loads((parties[name] / "state" / "tuned.json").read_text())["private"] for name in runs]
    assert [one["rounds"] for one in facts] == [2, 2] and [one["samples"] for one in facts] == [64, 64]


@pytest.mark.slow
def test_a_new_head_trains_at_the_party(command, tmp_path):
    """Sequence classification with an encoder: labels and head stay home."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**WIDTH | NO_DROP | {"num_hidden_layers": 4}, vocab_size=len(word_piece()),
                                     max_position_embeddings=64)
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    word_piece().save_pretrained(tmp_path / "model")
    command.json("compress", tmp_path / "model", "-o", tmp_path / "emulator", "--method", "emulator", "--keep-first", "1",
                 "--keep-last", "1", "--middle", "1", "--task", "sequence-classification")
    data = tmp_path / "data"
    data.mkdir()
    write_rows(data / "train.jsonl", records("text-label"))
    write_rows(data / "dev.jsonl", records("text-label", 12, seed=1))
    run = write_run(data, {"model": str(tmp_path / "emulator"), "task": "sequence-classification", "deltas": [PREFIX],
                           "data": {"train": "train.jsonl", "eval": "dev.jsonl", "max_length": 64},
                           "train": {"max_steps": 40, "batch_size": 8, "learning_rate": 0.01, "precision": "fp32"},
                           "private": {"cut": 1, "codec": "fp32"}})
    owner = tmp_path / "owner"
    command.json("owner", "init", owner, "--name", "acme")
    labels = ("--task", "sequence-classification", "--labels", "bad,good", "--rounds", 1, "--parties-per-round", 1)
    with Owner(owner, tmp_path / "model", "127.0.0.1:0", *labels, "--deltas", run):
        party = joined(command, owner, tmp_path)
        command.json("party", "emulate", party, run)
        tuned = command.json("party", "tune", party, run)
        assert tuned["metrics"]["loss"] < tuned["base_metrics"]["loss"] and tuned["private"]["rounds"] == 1
        assert tuned["head_parameters"] > 0
        assert command.json("party", "predict", party, "--data", data / "dev.jsonl", "-o", tmp_path / "out.jsonl")["rows"] == 12
        assert {json.loads(line)["label"] for line in (tmp_path / "out.jsonl").read_text().splitlines()} <= {"good", "bad"}
        assert "does not write text" in command.refused("party", "chat", party)


@pytest.mark.slow
def test_labels_at_the_owner_and_a_guard(command, place, tmp_path):
    guard = {"guard": "gaussian", "norm": 2.0, "sigma": 0.01}
    run = run_file(tmp_path / "data", place / "emulator", private={"labels": "owner", "codec": "int8", "guards": [guard]})
    owner = tmp_path / "owner"
    command.json("owner", "init", owner, "--name", "acme")
    with Owner(owner, place / "model"):
        party = joined(command, owner, tmp_path)
        said = command("party", "tune", party, run, "--json")
        tuned = json.loads(said.out)
        assert "each release of a row of hidden states costs mu 400" in said.err
        assert "What the guards promise, at delta 1e-06" in said.err and "NOT promised: labels: they are sent" in said.err
        own = command.json("party", "tune", party, run, "--personal")
    assert tuned["metrics"]["loss"] < tuned["base_metrics"]["loss"]
    page = (party / "tuned" / "report.html").read_text()
    assert "Privacy</h2>" in page and "one text, over all its rows" in page and "labels: they are sent to the owner" in page
    for found in (tuned, own):
        assert found == json.loads((party / ("personal" if found is own else "tuned") / "metrics.json").read_text()) | {
            "private": found["private"]}
    rows = [{(row["scope"], row["unit"]): row for row in found["privacy"]["rows"]} for found in (tuned, own)]
    assert rows[0]["run", "all rows"]["releases"] == rows[0]["folder", "all rows"]["releases"] > 1000
    assert rows[1]["folder", "all rows"]["releases"] == sum(each["run", "all rows"]["releases"] for each in rows)
    write_rows(tmp_path / "sample.jsonl", rows_of(24))
    found = command.json("leakage", party, "--data", tmp_path / "sample.jsonl", "--rows", "4", "--noise", "3",
                         "--attack", "nearest-embedding", "--attack", "probe-table")
    assert {one["case"] for one in found["table"]} == {"none", "the run's guards", "gaussian, 3 x rms"}
    assert {one["attack"] for one in found["table"]} == {"nearest-embedding", "probe-table"}
    assert found["labels"] == found["membership"] == [] and found["not_rehearsed"]
    found = command.json("leakage", party, "--data", tmp_path / "sample.jsonl", "--rows", "4", "--noise", "3")
    labels = {one["case"]: one for one in found["labels"]}
    assert set(labels) == {"none", "the run's guards", "gaussian on gradients, 3 x rms"}
    assert labels["none"]["recovered"] == 1.0 > labels["none"]["majority"]
    assert {(one["attack"], one["update"]) for one in found["membership"]} == {
        (attack, update) for attack in ("membership-gradient", "membership-loss") for update in ("single", "mean of 3")}
    assert all(0 <= one["auc"] <= 1 and one["chance"] == 0.5 < one["coin"] for one in found["membership"])
    page = (party / "leakage.html").read_text()
    assert "inferred from gradients" in page and "inferred from a round" in page
    assert "unknown attack" in command.refused("leakage", party, "--data", tmp_path / "sample.jsonl", "--attack", "magic")
    assert (party / "leakage.html").exists()


@pytest.mark.slow
def test_rounds_that_another_engine_brings_end_as_the_owners_own(command, place, tmp_path, monkeypatch):
    """The same party once in the owner's rounds, once at a mailbox, with the same coordinator behind both."""
    monkeypatch.chdir(tmp_path)   # a mailbox's path has to be short
    own = run_file(tmp_path / "own", place / "emulator")
    at = run_file(tmp_path / "at", place / "emulator", private={"mailbox": "rounds.sock"})
    owner = tmp_path / "owner"
    command.json("owner", "init", owner, "--name", "acme")
    more = ("--rounds", 2, "--parties-per-round", 1, "--deltas", own)
    with Owner(owner, place / "model", "127.0.0.1:0", *more) as serving:
        address = serving.address
        party = joined(command, owner, tmp_path)
        assert "holds joint rounds itself" in command.refused("party", "tune", party, at)
        command.json("party", "tune", party, own, "--overwrite")
    expected = delta_of(party)
    begin, _ = native.read(party / "tuned" / "delta")
    machine = DurableRounds(Coordinator(RoundSettings(rounds=3, parties=1, quorum=1), Weighted(), begin.state, run="m"),
                            tmp_path / "machine")

    def engine():
        while not (stand := machine.answer("a", StandRequest())).done:
            machine.answer("a", carry(stand, Path("a/rounds.sock"), patience=200))
        assert carry(stand, Path("a/rounds.sock"), patience=200) is None

    thread = threading.Thread(target=engine, daemon=True)
    thread.start()
    with Owner(owner, place / "model", address):
        tuned = command.json("party", "tune", Path("a"), at, "--overwrite")
    thread.join(20)
    assert delta_of(party) == expected and not (party / "rounds.sock").exists()
    assert tuned["private"]["rounds"] == 2 and tuned["private"]["samples"] == 64
    assert machine.coordinator.version == 3
