"""The audit log: the chain shows every change, a killed writer's line is cut off with a note, several writers share it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from deltaloom.errors import CheckpointError, ResourceError, UsageError
from deltaloom.private import audit
from deltaloom.private.audit import START, Audit, read_audit, verify

ROOT = Path(__file__).parents[2]
WRITER = "import sys; from pathlib import Path; from deltaloom.private.audit import Audit\n" \
         "log = Audit(Path(sys.argv[1])); n = 0\n" \
         "while True:\n    n += 1; log.write(sys.argv[2], 'step', step=n); print(n, flush=True)\n"


@pytest.fixture
def log(tmp_path):
    made = Audit(tmp_path / "audit.jsonl")
    for step in range(5):
        made.write("a", "loss", step=step, up=100)
    return made


def test_the_chain_is_the_hash_that_the_page_says(log):
    before = START
    for number, line in enumerate(log.path.read_bytes().splitlines(), 1):
        record = json.loads(line)
        digest = record.pop("hash")
        text = json.dumps(record, sort_keys=True, separators=(",", ":"))
        assert record["n"] == number and digest == hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()
        before = digest
    assert log.head.hash == before and verify(log.path) == log.head
    assert [record["step"] for record in read_audit(log.path)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("change", [
    lambda lines: [*lines[:2], lines[2].replace(b'"up":100', b'"up":101'), *lines[3:]],
    lambda lines: [*lines[:2], *lines[3:]],
    lambda lines: lines[1:],
    lambda lines: [lines[0], lines[0], *lines[1:]],
    lambda lines: [lines[1], lines[0], *lines[2:]],
    lambda lines: [*lines[:2], b"{}\n", *lines[2:]],
    lambda lines: [*lines[:2], b"[1]\n", *lines[2:]],
    lambda lines: [*lines[:2], b"x" * 9000 + b"\n", *lines[2:]],
    lambda lines: [*lines[:-1], lines[-1].replace(b'"n":5', b'"n":6')],
])
def test_a_changed_removed_or_inserted_line_is_found(log, change):
    log.path.write_bytes(b"".join(change(log.path.read_bytes().splitlines(keepends=True))))
    for look in (verify, Audit):
        with pytest.raises(CheckpointError, match="breaks at line"):
            look(log.path)


def test_lines_removed_at_the_end_are_found_by_who_kept_the_head(log):
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(lines[:-1]))
    assert verify(log.path) != log.head
    assert verify(log.path).hash == json.loads(lines[-2])["hash"]


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_torn_last_line_is_cut_off_with_a_note(log, cut):
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-cut])
    assert verify(log.path).lines == 4   # looking changes nothing
    again = Audit(log.path)
    again.write("b", "loss")
    records = read_audit(log.path)
    assert [record["what"] for record in records] == ["loss"] * 4 + ["torn-line-cut", "loss"]
    assert records[4]["bytes"] == len(whole.splitlines()[-1]) + 1 - cut


def test_kill_9_of_a_writer_loses_no_line_that_was_written(tmp_path):
    path = tmp_path / "audit.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    for name in ("a", "b", "c"):
        command = [sys.executable, "-c", WRITER, str(path), name]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(20):
            last = int(writer.stdout.readline())
        writer.kill()
        writer.wait()
        writer.stdout.close()
        Audit(path)
        assert sum(record["who"] == name for record in read_audit(path)) >= last == 20


def test_several_writers_share_one_chain(tmp_path):
    logs = [Audit(tmp_path / "audit.jsonl") for _ in range(3)]
    threads = [threading.Thread(target=lambda log=log, i=i: [log.write(f"p{i}", "step", step=n) for n in range(30)])
               for i, log in enumerate(logs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verify(logs[0].path).lines == 90


def test_a_log_takes_facts_and_not_content(log):
    with pytest.raises(UsageError, match="not content"):
        log.write("a", "loss", note="x" * 201)
    assert verify(log.path).lines == 5


def test_a_log_that_becomes_shorter_in_use_is_noticed(log):
    with log.path.open("r+b") as file:
        file.truncate(10)
    with pytest.raises(CheckpointError, match="shorter"):
        log.write("a", "loss")


def test_a_full_disk_leaves_the_log_as_it_was(log, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(data[:10])
            raise OSError(28, "no space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    @contextmanager
    def full(path):
        with real(path) as file:
            yield Full(file)

    real = audit._alone
    monkeypatch.setattr(audit, "_alone", full)
    with pytest.raises(ResourceError, match="no space"):
        log.write("a", "loss", step=5)
    monkeypatch.undo()
    assert verify(log.path).lines == 5
    log.write("a", "loss", step=6)
    assert verify(log.path).lines == 6


def test_a_line_costs_little(log):
    began = time.perf_counter()
    for step in range(200):
        log.write("hospital-a", "loss", run="run-1", step=step, micro=0, tokens=512, up=10**6, down=10**6, ms=20.0)
    assert (time.perf_counter() - began) / 200 < 0.005
