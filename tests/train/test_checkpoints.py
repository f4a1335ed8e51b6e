from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple

import pytest
import torch

from deltaloom.errors import CheckpointError, ResourceError
from deltaloom.events import Warned
from deltaloom.train import checkpoints as module
from deltaloom.train.checkpoints import (
    checkpoints,
    latest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    remove_leftovers,
    write_checkpoint,
)
from tests.train.pieces import Log

PARTS = {"delta": {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0)}, "controllers": [{"n": 3, "t": torch.ones(())}, {}],
         "progress": {"step": 4, "seconds": 0.1 + 0.2, "log_bytes": 3}, "settings": {"learning_rate": 1e-3}}


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_parts_come_back_bit_for_bit_without_pickles(tmp_path):
    path = write_checkpoint(tmp_path, 4, PARTS)
    found = read_checkpoint(path)
    assert (found.step, found.path) == (4, tmp_path / "step-4")
    assert torch.equal(found.parts["delta"]["a"], PARTS["delta"]["a"])
    assert found.parts["delta"]["b"].shape == (0,)
    assert torch.equal(found.parts["controllers"][0].pop("t"), torch.ones(()))
    assert found.parts["controllers"] == [{"n": 3}, {}]
    assert found.parts["progress"] == PARTS["progress"]
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}


def test_tensors_that_share_memory_or_are_views_can_be_kept(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    path = write_checkpoint(tmp_path, 1, {"delta": {"one": whole, "same": whole, "part": whole[1], "turned": whole.T}})
    delta = read_checkpoint(path).parts["delta"]
    assert torch.equal(delta["one"], delta["same"])
    assert torch.equal(delta["part"], whole[1])
    assert torch.equal(delta["turned"], whole.T)


def test_an_existing_folder_of_the_step_is_replaced(tmp_path):
    write_checkpoint(tmp_path, 4, PARTS)
    write_checkpoint(tmp_path, 4, {"progress": {"step": 5}})
    assert read_checkpoint(tmp_path / "step-4").parts == {"progress": {"step": 5}}
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]


def damage_cut(path):
    file = path / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def damage_flip(path):
    file = path / "state.json"
    file.write_bytes(file.read_bytes().replace(b"0.30000000000000004", b"0.30000000000000005"))


def damage_missing(path):
    (path / "delta.safetensors").unlink()


def damage_manifest(path):
    (path / "manifest.json").unlink()


def damage_manifest_text(path):
    (path / "manifest.json").write_text("[]")


def damage_extra(path):
    (path / "more.safetensors").write_bytes(b"")


def damage_version(path):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))


def damage_all(path):
    for file in path.iterdir():
        file.unlink()


DAMAGES = [damage_cut, damage_flip, damage_missing, damage_manifest, damage_manifest_text, damage_extra, damage_version,
           damage_all]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_passed_over_with_a_warning(damage, tmp_path):
    write_checkpoint(tmp_path, 2, PARTS)
    damage(write_checkpoint(tmp_path, 6, PARTS))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "step-6")
    log = Log()
    assert latest_checkpoint(tmp_path, log.emit).step == 2
    assert {event.kind for event in log.of(Warned)} == {"damaged-checkpoint"}


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere", Log().emit) is None
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-3").write_text("a file")
    assert latest_checkpoint(tmp_path, Log().emit) is None


def test_newest_is_by_number_not_by_name(tmp_path):
    for step in (9, 10, 100):
        write_checkpoint(tmp_path, step, PARTS)
    assert latest_checkpoint(tmp_path, Log().emit).step == 100
    assert [step for step, _ in checkpoints(tmp_path)] == [9, 10, 100]


def test_pruning_keeps_the_newest_and_the_named(tmp_path):
    for step in range(1, 6):
        write_checkpoint(tmp_path, step, {"progress": {}})
    prune_checkpoints(tmp_path, 2, [1, None])
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-4", "step-5"]


def test_leftovers_of_a_killed_run_are_deleted_with_a_warning(tmp_path):
    write_checkpoint(tmp_path, 1, PARTS)
    for name in (".step-2.ab12.part", ".step-1.pruned.old", ".other", "notes"):
        (tmp_path / name).mkdir()
    log = Log()
    remove_leftovers(tmp_path, log.emit)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other", "notes", "step-1"]
    assert [(event.kind, event.count) for event in log.of(Warned)] == [("cut-checkpoint", 2)]
    remove_leftovers(tmp_path, log.emit)
    assert len(log.events) == 1


def test_too_little_space_is_seen_before_writing(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, PARTS)
    before = files_of(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, module.SPARE + 10))
    with pytest.raises(ResourceError, match="no disk space") as error:
        write_checkpoint(tmp_path, 2, PARTS)
    assert error.value.exit_code == 3
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("where", ["tensors", "json", "sync"])
def test_a_disk_that_fills_while_writing_loses_nothing(where, tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, PARTS)
    before = files_of(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    def full_rust(*args, **kwargs):
        raise module.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    if where == "tensors":
        monkeypatch.setattr(module, "save_file", full_rust)
    elif where == "json":
        monkeypatch.setattr(module.Path, "write_text", full)
    else:
        monkeypatch.setattr("deltaloom.files.os.fsync", full)
    with pytest.raises(ResourceError, match="no space is left"):
        write_checkpoint(tmp_path, 2, PARTS)
    assert files_of(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    found = read_checkpoint(write_checkpoint(tmp_path, 4, PARTS))
    log = tmp_path / "events.jsonl"
    assert found.rewind(log) == 0
    log.write_text("ab")
    assert found.rewind(log) == 0
    log.write_text("ab\nlater\n")
    assert found.rewind(log) == 6
    assert log.read_text() == "ab\n"
