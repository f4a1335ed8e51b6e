"""What goes wrong in private tuning is said with the next step, and leaves everything as it was."""

import pytest

from deltaloom.jobs import party as party_jobs
from tests.cli.private_flow import Owner, emulator_of, run_file, toy_model
from tests.cli.test_private import joined
from tests.jobs.small import files_of, write_rows

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("private")
    for name, seed in (("model", 0), ("other", 1)):
        toy_model(folder / name, seed=seed)
        emulator_of(folder / name, folder / f"{name}-emulator")
    return folder


def test_owners_mistakes(command, place, tmp_path):
    owner = tmp_path / "owner"
    assert "owner's folder" in command.refused("owner", "invite", owner, "--party", "a", "-o", tmp_path / "a.invite")
    assert "a-z" in command.refused("owner", "init", owner, "--name", "No Name")
    assert not owner.exists()
    command.json("owner", "init", owner, "--name", "acme", "--cut", "1")
    before = files_of(owner)
    assert "not empty" in command.refused("owner", "init", owner, "--name", "acme")
    assert "no address" in command.refused("owner", "invite", owner, "--party", "a", "-o", tmp_path / "a", "--address", "here")
    assert "unknown party" in command.refused("owner", "revoke", owner, "--party", "a")
    assert "--deltas" in command.refused("owner", "serve", owner, "--model", place / "model", "--rounds", "2")
    assert "cut" in command.refused("owner", "serve", owner, "--model", place / "model", "--cut", "9")
    assert "legal: causal-lm" in command.refused("owner", "serve", owner, "--model", place / "model", "--task", "regression")
    assert "no audit log" in command.refused("owner", "audit", owner)
    assert {name: content for name, content in files_of(owner).items() if name != "register.lock"} == before
    made = command.json("owner", "invite", owner, "--party", "a", "-o", tmp_path / "a.invite")
    assert made["address"] == "127.0.0.1:7443" and (tmp_path / "a.invite").stat().st_mode & 0o077 == 0
    assert "exists" in command.refused("owner", "invite", owner, "--party", "a", "-o", tmp_path / "a.invite")


def test_a_party_without_an_owner(command, place, tmp_path, monkeypatch):
    monkeypatch.setattr(party_jobs, "ARRIVE_SECONDS", 0.1)
    run = run_file(tmp_path / "data", place / "model-emulator")
    party = tmp_path / "a"
    assert "party join" in command.refused("party", "tune", party, run)
    owner = tmp_path / "owner"
    command.json("owner", "init", owner, "--name", "acme")
    command.json("owner", "invite", owner, "--party", "a", "-o", tmp_path / "a.invite", "--address", "127.0.0.1:9")
    assert "run the same command again" in command.refused("party", "join", tmp_path / "a.invite", "-o", party,
                                                           "--patience", "0.2", code=1)
    assert "no certificate yet" in command.refused("party", "tune", party, run)
    (tmp_path / "a.invite").chmod(0o644)
    assert "chmod 600" in command.refused("party", "join", tmp_path / "a.invite", "-o", party)


def test_a_party_that_does_not_fit(command, place, tmp_path, monkeypatch):
    owner = tmp_path / "owner"
    command.json("owner", "init", owner, "--name", "acme")
    run = run_file(tmp_path / "data", place / "model-emulator")
    with Owner(owner, place / "model"):
        party = joined(command, owner, tmp_path)
        before = files_of(party)
        assert "'private'" in command("tune", run, "-s", "train.max_steps=1", "-s", f"output={tmp_path / 'plain'}").err
        assert "labels" in command.refused("party", "tune", party, run, "-s", "private.lables=home")
        assert "legal: bf16, fp32, int8" in command.refused("party", "tune", party, run, "-s", "private.codec=zip")
        assert "Did you mean" in command.refused("party", "tune", party, run, "-s", "private.guards=[{guard: gausian}]")
        assert "cut" in command.refused("party", "tune", party, run, "-s", "private.cut=2", code=1)
        other = command.refused("party", "tune", party, run, "-s", f"model={place / 'other-emulator'}")
        assert "sha256" in other and "emulator of the model that it serves" in other
        assert "--personal" in command.refused("party", "tune", party, run, "--personal")
        write_rows(tmp_path / "new.jsonl", [{"prompt": "x"}])
        assert "party tune" in command.refused("party", "predict", party, "--data", tmp_path / "new.jsonl")
        assert "party tune" in command.refused("leakage", party, "--data", tmp_path / "new.jsonl")
        assert {name: content for name, content in files_of(party).items() if not name.startswith("state/")} == before
        command.json("party", "emulate", party, run)
        assert "party emulate" in command.refused("party", "tune", party, run, "-s", "deltas.0.length=4")
        assert not (party / "tuned").exists()
