"""The commands of private tuning from end to end: real processes, a toy model, mutual TLS on loopback."""

import json

import pytest

from tests.cli.private_flow import CANARY, Owner, delta_of, emulator_of, rows_of, run_file, toy_model
from tests.jobs.small import write_rows

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


def test_the_whole_flow(command, place, tmp_path):
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
        assert "--overwrite" in command.refused("party", "tune", party, run)
        own = command.json("party", "tune", party, run, "--personal")
        assert own["metrics"]["loss"] < tuned["metrics"]["loss"]
        write_rows(tmp_path / "new.jsonl", [{"prompt": row["prompt"]} for row in rows_of(3)])
        assert command.json("party", "predict", party, "--data", tmp_path / "new.jsonl", "-o", tmp_path / "out.jsonl",
                            "--max-new-tokens", "6")["rows"] == 3
        assert [set(json.loads(line)) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == 3 * [{"row", "where", "text"}]
        said = command("party", "chat", party, "--max-new-tokens", "4", stdin="hello\n\n")
        assert said.code == 0 and said.out.count("\n") >= 2, said.err
        status = command.json("owner", "status", owner)
        assert status["running"] and status["address"] == serving.address
        assert [(one["party"], one["state"]) for one in status["parties"]] == [("a", "enrolled")]
        assert status["parties"][0]["bytes"] >= tuned["private"]["up"] + tuned["private"]["down"]
        assert command.json("owner", "revoke", owner, "--party", "a")["revoked"] > 0
        assert "revoked" in command.refused("party", "predict", party, "--data", tmp_path / "new.jsonl", "-o", tmp_path / "no.jsonl",
                                            code=1)
        assert not (tmp_path / "no.jsonl").exists()
        assert serving.stop() == 0
    found = command.json("owner", "audit", owner)
    assert {"invited", "enrolled", "connected", "revoked"} <= {one["what"] for one in found["did"]}
    for path in [*owner.rglob("*"), tmp_path / "owner.log"]:
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path
    secrets = [path for folder in (owner, party) for path in folder.rglob("*") if path.suffix == ".key"]
    assert len(secrets) >= 3 and all(path.stat().st_mode & 0o077 == 0 for path in secrets)
    lines = (owner / "audit.jsonl").read_text().splitlines()
    (owner / "audit.jsonl").write_text("\n".join([*lines[:2], *lines[3:]]) + "\n")
    assert "line 3" in command.refused("owner", "audit", owner, code=command("owner", "audit", owner).code)
    assert delta_of(party) != delta_of(party, "emulated")
