"""`deltaloom tune` in two processes, and what other commands say to that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.small import run_values, write_run

ROOT = Path(__file__).parents[2]
LORA = {"method": "lora", "rank": 2}
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}


class Team:
    """What commands of two processes printed and left."""

    def __init__(self, folder: Path, models: dict[str, Path]) -> None:
        self.folder, self.models = folder, models
        self.commands: list[tuple[str, int, list[str]]] = []

    def run(self, name: str, kind: str, *options: str, **train: Any) -> Path:
        """Ask for a run of two processes; the same run file alone lies in `alone/`."""
        place = self.folder / name
        place.mkdir()
        path = write_run(place, run_values(kind, self.models, place, [LORA], **train))
        self.commands.append((name, 2, ["tune", str(path), "--json", *options]))
        return path

    def do(self) -> None:
        (self.folder / "commands.json").write_text(json.dumps(self.commands))
        done = subprocess.run([sys.executable, "-m", "tests.cli.in_processes", str(self.folder)], cwd=ROOT, text=True,
                              env={**os.environ, **ENVIRONMENT}, capture_output=True, timeout=280)
        assert done.returncode == 0, done.stderr

    def printed(self, name: str) -> tuple[list[int], list[str], list[str]]:
        """(exit codes, standard outputs, standard errors) of a command's processes."""
        texts = [[(self.folder / f"{name}-{number}.{ending}").read_text() for number in range(2)] for ending in ("out", "err")]
        return json.loads((self.folder / f"{name}.codes").read_text()), texts[0], texts[1]


@pytest.fixture(scope="module")
def team(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Team:
    team = Team(tmp_path_factory.mktemp("processes"), models)
    team.run("prompts", "prompts", save_every=2, keep_checkpoints=9)
    path = team.run("bad", "classes")
    (path.parent / "train.jsonl").write_text('{"text": "a film", "label": "good"}\n{"text": "a shop"}\n')
    team.commands.append(("unknown", 2, ["tune", str(path), "-s", "train.epohs=3"]))
    team.commands.append(("other", 2, ["plan", str(path)]))
    team.do()
    return team


def figures(metrics: dict[str, float | None]) -> dict[str, float]:
    """Metrics, without those that are not defined on these rows."""
    return {name: value for name, value in metrics.items() if value is not None}


def assert_a_run_of_two(team: Team, name: str, command: Any) -> dict[str, Any]:
    """Its first process alone spoke and wrote, and its figures are those of one process."""
    codes, out, err = team.printed(name)
    assert codes == [0, 0], err
    assert out[1] == "" and err[1] == "" and "Report: " in err[0]
    found = json.loads(out[0])
    place = team.folder / name
    assert json.loads((place / "run" / "metrics.json").read_text()) == found
    assert json.loads((place / "run" / "environment.json").read_text())["processes"] == 2
    known = command.json("tune", place / "run.yaml", "-s", f"output={place / 'alone'}")
    for key in ("metrics", "base_metrics"):
        assert figures(found[key]) == pytest.approx(figures(known[key]), rel=1e-3)
    for key in ("tokens", "steps", "trainable_parameters", "methods", "total_parameters", "flops_per_token"):
        assert found[key] == known[key], key
    events = [json.loads(line)["event"] for line in (place / "run" / "events.jsonl").read_text().splitlines()]
    assert events == [json.loads(line)["event"] for line in (place / "alone" / "events.jsonl").read_text().splitlines()]
    return known


def test_two_processes_leave_the_run_of_one(team, command):
    assert_a_run_of_two(team, "prompts", command)
    lines = [[json.loads(line) for line in (team.folder / "prompts" / run / "predictions.jsonl").read_text().splitlines()]
             for run in ("run", "alone")]
    assert [line["row"] for line in lines[0]] == [line["row"] for line in lines[1]]
    assert [line["loss"] for line in lines[0]] == pytest.approx([line["loss"] for line in lines[1]], rel=1e-3)


@pytest.mark.slow
def test_other_tasks_and_a_spread_base_leave_the_run_of_one(models, tmp_path, command):
    team = Team(tmp_path, models)
    team.run("spread", "prompts", "-s", "train.shard=true")
    team.run("packed", "prompts", packing=True)
    for kind in ("classes", "numbers", "tags", "pairs"):
        team.run(kind, kind)
    team.do()
    for name, *_ in team.commands:
        assert_a_run_of_two(team, name, command)


def test_one_process_goes_on_with_the_run_of_two(team, command):
    run = team.folder / "prompts" / "run"
    known = json.loads((run / "metrics.json").read_text())
    for gone in ("checkpoints/step-4/manifest.json", "metrics.json"):
        (run / gone).unlink()
    found = command.json("tune", team.folder / "prompts" / "run.yaml", "--resume")
    assert found["metrics"] == pytest.approx(known["metrics"], rel=1e-3)
    assert '"resumed"' in (run / "events.jsonl").read_text()


@pytest.mark.parametrize(("name", "words"), [
    ("bad", "train.jsonl:2"), ("unknown", "epochs"), ("other", "this command works in one process")])
def test_the_first_process_alone_says_what_is_wrong(name, words, team):
    codes, out, err = team.printed(name)
    assert codes == [2, 2] and out == ["", ""]
    assert words in err[0] and "Traceback" not in err[0]
    assert err[1] == "" or name == "other"  # refused before there is a team


def test_one_process_cannot_spread_its_base(models, tmp_path, command):
    path = write_run(tmp_path, run_values("prompts", models, tmp_path, [LORA], shard=True))
    assert "torchrun" in command.refused("tune", path)


@pytest.mark.slow
def test_torchrun_itself(models, tmp_path, command):
    path = write_run(tmp_path, run_values("prompts", models, tmp_path, [LORA]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "deltaloom", "tune",
                str(path), "--json"]
    done = subprocess.run(torchrun, cwd=tmp_path, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    known = command.json("tune", path, "-s", f"output={tmp_path / 'alone'}")
    assert found["metrics"] == pytest.approx(known["metrics"], rel=1e-3)
    failed = subprocess.run([*torchrun, "-s", "train.epohs=1"], cwd=tmp_path, env={**os.environ, **ENVIRONMENT}, text=True,
                            capture_output=True, timeout=280)
    assert failed.returncode != 0 and failed.stderr.count("epohs") == 1 and not (tmp_path / "runs").exists()
