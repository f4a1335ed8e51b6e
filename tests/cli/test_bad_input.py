"""What is wrong is said, with the value, what is legal and the next step; the exit code is promised; nothing is half-written."""

import builtins
import errno
import os
import shutil
from pathlib import Path

import pytest
import yaml

from tests.jobs.small import files_of, make_model, records, run_values, write_rows, write_run

LORA = {"method": "lora", "rank": 2}


@pytest.fixture
def start(models, tmp_path):
    """A run file that works, and its folder."""
    return write_run(tmp_path, run_values("classes", models, tmp_path, [LORA]))


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """The folder of a finished run."""
    from deltaloom.jobs.runfile import read_run_file
    from deltaloom.jobs.tune import tune

    folder = tmp_path_factory.mktemp("finished")
    tune(read_run_file(write_run(folder, run_values("classes", models, folder, [LORA]))), say=lambda text: None)
    return folder


SETTINGS = [
    ("tain.epochs=1", ["tain", "Did you mean 'train'?"]),
    ("data.colums={}", ["colums", "Did you mean 'columns'?"]),
    ("train.learning_rat=1", ["learning_rat", "Did you mean 'learning_rate'?"]),
    ("deltas.0.rnk=3", ["deltas.0 (lora)", "rnk", "Did you mean 'rank'?"]),
    ("deltas.0.rank=0", ["rank", "greater than or equal to 1", "got 0"]),
    ("train.learning_rate=.nan", ["learning_rate", "nan"]),
    ("train.learning_rate=.inf", ["learning_rate", "inf"]),
    ("train.learning_rate=-1", ["learning_rate", "greater than 0", "got -1"]),
    ("train.epochs=1", ["epochs and max_steps exclude each other"]),
    ("train.max_time=soon", ["max_time", "20m"]),
    ("deltas.0.method=qlora", ["qlora", "quantise the base and use lora"]),
    ("deltas.0.method=lorra", ["deltas.0", "lorra", "Did you mean 'lora'?"]),
    ("deltas=[]", ["deltas", "deltaloom methods"]),
    ("deltas=[{rank: 3}]", ["method: NAME"]),
    ("deltas=[{from: nowhere}]", ["delta.json", "nowhere"]),
    ("deltas=7", ["deltas"]),
    ("deltas.3.rank=7", ["names no entry", "'3'"]),
    ("seed=-1", ["seed"]),
    ("task=sequence-clasification", ["Did you mean 'sequence-classification'?"]),
    ("task=causal-lm", ["causal-lm"]),
    ("model=./nowhere", ["nowhere"]),
    ("model=''", ["model"]),
    ("deltas.0.targets=[q_prj]", ["q_prj", "query"]),
    ("data.train=missing.jsonl", ["missing.jsonl"]),
    ("data.train=null", ["data.train is missing"]),
    ("data.template='{nothing}'", ["nothing", "text"]),
    ("data.columns={text: body}", ["body"]),
    ("data.format=messages", ["messages", "text-label"]),
    ("data.max_length=3", ["max_length"]),
    ("train.metric=f7", ["train.metric", "accuracy"]),
    ("learning_rate", ["key.path=value"]),
    ("=3", ["key.path=value"]),
    ("train.learning_rate=[1", ["not valid YAML"]),
    ("seed.deep.er=3", ["seed"]),
]


@pytest.mark.parametrize(("change", "says"), SETTINGS, ids=[change for change, _ in SETTINGS])
def test_a_wrong_setting_is_named_and_nothing_is_written(change, says, start, command):
    message = command.refused("tune", start, "-s", change)
    assert [words for words in says if words not in message] == [], message
    assert not (start.parent / "run").exists()
    if change not in ("train.metric=f7",):  # needs the metrics of the model
        command.refused("plan", start, "-s", change)


DATA = [
    ("column", b'{"text": "the film", "lable": "good"}\n{"text": "a film", "lable": "bad"}\n',
     ["label", "Did you mean 'lable'?"]),
    ("row", b'{"text": "the film", "label": "good"}\n{"text": "a film"}\n{"text": "", "label": "bad"}\n',
     ["train.jsonl:2", "label", "train.jsonl:3", "empty"]),
    ("empty", b"", ["train.jsonl", "empty"]),
    ("binary", bytes(range(256)) * 4, ["train.jsonl"]),
    ("cut", b'{"text": "the film", "label": "good"}\n{"text": "a fi', ["train.jsonl:2"]),
    ("one-label", b'{"text": "the film", "label": "good"}\n{"text": "a film", "label": "good"}\n', ["label"]),
]


@pytest.mark.parametrize(("content", "says"), [case[1:] for case in DATA], ids=[case[0] for case in DATA])
def test_bad_training_rows_are_named_by_file_and_line(content, says, start, command):
    (start.parent / "train.jsonl").write_bytes(content)
    message = command.refused("tune", start)
    assert [words for words in says if words not in message] == [], message
    assert not (start.parent / "run").exists()


def test_a_label_of_the_evaluation_rows_only(start, command):
    write_rows(start.parent / "dev.jsonl", [*records("text-label", 4), {"text": "the film", "label": "odd"}])
    message = command.refused("tune", start)
    assert "'odd'" in message and "dev.jsonl:5" in message and "good" in message


def test_a_label_that_the_trained_model_does_not_know(finished, tmp_path, command):
    rows = write_rows(tmp_path / "new.jsonl", [{"text": "the film", "label": "odd"}])
    message = command.refused("eval", finished / "run", "--data", rows)
    assert "'odd'" in message and "new.jsonl:1" in message


def test_rows_that_are_longer_than_the_model_has_positions(start, command):
    write_rows(start.parent / "train.jsonl", [{"text": "the film " * 100, "label": label} for label in ("good", "bad")] * 4)
    done = command("tune", start, "-s", "data.max_length=256")
    assert done.code == 0, done.err
    assert "data.max_length 256 counts as 64" in done.err and "cut" in done.err


BOMB = ["a0: &a0 [x, x, x, x, x, x, x, x, x]",
        *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))]  # each line nine times the last
RUN_FILES = {
    "list": (b"- a\n- b\n", "mapping"), "number": (b"3", "mapping"), "empty": (b"", "mapping"),
    "binary": (bytes(range(256)), "text"), "broken": (b"model: [\n", "broken.yaml"), "tab": (b"a:\n\t- b: c", "valid YAML"),
    "tag": (b"model: !!python/object:os.x {}", "YAML"), "twice": (b"model: a\nmodel: b\n", "stands there twice"),
    "date": (b"model: !!timestamp 2001-99-99", "YAML"), "deep": (b"[" * 5000, "YAML"), "cycle": (b"model: &a [*a]", "deep"),
    "typo": (b"modle: x\ndata: {}\n", "Did you mean 'model'?"), "bomb": ("\n".join(BOMB).encode(), "more than"),
}


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_run_file_that_is_none(name, tmp_path, command):
    content, says = RUN_FILES[name]
    (tmp_path / f"{name}.yaml").write_bytes(content)
    for job in ("plan", "tune"):
        assert says in command.refused(job, tmp_path / f"{name}.yaml")
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.yaml"]


def test_a_run_file_that_is_a_folder_or_absent(tmp_path, command):
    assert "folder" in command.refused("tune", tmp_path)
    assert "deltaloom init" in command.refused("tune", tmp_path / "none.yaml")


def test_wrong_usage_of_the_command_line_is_exit_2(command):
    for arguments in (["tune"], ["tnue", "x"], ["tune", "x", "--nothing"], ["combine", "a", "-o", "b"],
                      ["convert", "a", "-o", "b"]):
        assert command.refused(*arguments)


@pytest.mark.parametrize("damage", ["cut", "flipped", "header"])
@pytest.mark.parametrize("which", ["model", "delta"])
def test_damaged_weights(which, damage, start, finished, models, tmp_path, command):
    copy = tmp_path / "copy"
    shutil.copytree(models["bert"] if which == "model" else finished / "run", copy)
    path = copy / ("model.safetensors" if which == "model" else "delta/delta.safetensors")
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-40:]
    elif damage == "header":
        data[:4] = b"\xff\xff\xff\xff"
    else:
        data[8 + int.from_bytes(data[:8], "little") + 3] ^= 0x80  # the sign of the first number
    path.write_bytes(data)
    if which == "delta":
        for arguments in (("eval", copy, "--data", finished / "dev.jsonl"), ("merge", copy, "-o", tmp_path / "out")):
            assert "delta.safetensors" in command.refused(*arguments)
        if damage != "flipped":
            assert "delta.safetensors" in command.refused("inspect", copy)
    elif damage == "flipped":  # a model has no checksum; a delta that was trained on the whole one notices
        assert "fingerprint" in command.refused("eval", copy, "--delta", finished / "run", "--data", finished / "dev.jsonl")
    else:
        assert str(copy) in command.refused("tune", start, "-s", f"model={copy}")
    assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()


def test_a_delta_of_another_base(finished, models, tmp_path, command):
    message = command.refused("eval", models["other-bert"], "--delta", finished / "run", "--data", finished / "dev.jsonl")
    assert message.count("fingerprint") >= 2
    assert "fingerprint" in command.refused("merge", finished / "run", "--model", models["other-bert"], "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_trained_head(models, finished, tmp_path, command):
    for task in ("sequence-classification", "regression"):
        message = command.refused("eval", models["bert"], "--task", task, "--data", finished / "dev.jsonl")
        assert "no trained head" in message
    message = command.refused("predict", models["bert"], "--task", "regression", "--data", finished / "dev.jsonl",
                              "-o", tmp_path / "out.jsonl")
    assert "no trained head" in message and not (tmp_path / "out.jsonl").exists()
    assert "--task" in command.refused("eval", models["bert"], "--data", finished / "dev.jsonl")


def test_commands_that_do_not_fit_what_they_are_given(finished, models, tmp_path, command):
    assert "deltaloom predict" in command.refused("chat", finished / "run")
    assert "no delta" in command.refused("merge", models["bert"], "-o", tmp_path / "out")
    assert "no delta" in command.refused("inspect", tmp_path)
    for weights in ("a,b", "1", "1,2,3"):
        message = command.refused("combine", finished / "run", finished / "run", "--weights", weights, "-o", tmp_path / "out")
        assert "weight" in message
    assert "two or more" in command.refused("combine", finished / "run", "-o", tmp_path / "out")
    assert "peft" in command.refused("convert", finished / "run", "--to", "pefft", "-o", tmp_path / "out")
    assert "share" in command.refused("convert", finished / "run", "--to", "lora", "--error", "1.5", "-o", tmp_path / "out")
    assert "fp33" in command.refused("merge", finished / "run", "--dtype", "fp33", "-o", tmp_path / "out")
    assert "not empty" in command.refused("merge", finished / "run", "-o", finished)
    assert "data section" in command.refused("eval", finished / "run", "--data", finished / "dev.jsonl", "-s", "seed=3")
    assert "folder" in command.refused("predict", finished / "run", "--data", finished / "dev.jsonl", "-o", tmp_path)
    command.refused("report", tmp_path, "-o", tmp_path / "r.html")
    command.refused("compare", tmp_path, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_an_output_that_may_not_be_written(start, command):
    start.parent.joinpath("closed").mkdir(mode=0o500)
    assert "cannot be made" in command.refused("tune", start, "-s", f"output={start.parent / 'closed' / 'run'}")


def test_an_output_that_is_a_file(start, command):
    for name in (start, start / "run"):
        assert "file" in command.refused("tune", start, "-s", f"output={name}") or name != start


@pytest.mark.parametrize("name", ["delta", "metrics.json", "step-4"])
def test_a_full_disk_is_exit_3_and_leaves_whole_files(name, start, command, monkeypatch):
    real = os.fsync

    def full(handle):
        if f"/.{name}." in str(Path(f"/proc/self/fd/{handle}").readlink()):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        message = command.refused("tune", start, code=3)
    assert "space" in message
    found = files_of(start.parent / "run")
    assert not [path for path in found if path.startswith(name) or ".part" in path]
    assert yaml.safe_load(found["run.yaml"])
    assert command.json("tune", start, "--resume")["metrics"]


def test_out_of_memory_is_exit_3(start, command, monkeypatch):
    def none(*arguments, **settings):
        raise MemoryError

    monkeypatch.setattr("deltaloom.jobs.tune.prepare", none)
    assert "smaller batch" in command.refused("tune", start, code=3)


def test_an_interruption_before_training_is_exit_130(start, command, monkeypatch):
    def stopped(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("deltaloom.jobs.tune.prepare", stopped)
    command.refused("tune", start, code=130)


def test_a_fault_of_ours_is_exit_1_and_has_a_traceback_only_if_asked(start, command, monkeypatch):
    def broken(*arguments, **settings):
        raise builtins.ZeroDivisionError("nothing to share")

    monkeypatch.setattr("deltaloom.jobs.tune.prepare", broken)
    done = command("tune", start)
    assert (done.code, done.out) == (1, "") and "fault of deltaloom" in done.err and "Traceback" not in done.err
    assert "Traceback" in command("tune", start, "-v").err


def test_a_loss_that_is_not_finite_names_step_and_rows(start, command, tmp_path):
    import torch

    model = make_model("bert", tmp_path / "huge")
    from safetensors.torch import load_file, save_file

    state = load_file(model / "model.safetensors")
    state["embeddings.word_embeddings.weight"] = torch.full_like(state["embeddings.word_embeddings.weight"], float("nan"))
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    done = command("tune", start, "-s", f"model={model}")
    assert done.code in (1, 2) and done.out == "" and "fault of deltaloom" not in done.err, done.err
