import subprocess
import sys

import pytest

from deltaloom.errors import UsageError
from deltaloom.report.tensorboard import TensorBoard

from .folders import run_events


def test_scalars_are_written_and_read_back(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    happened = run_events(steps=12)
    with TensorBoard(tmp_path / "tb") as sink:
        for event in happened:
            sink(event)
    sink.close()
    read = loader.EventAccumulator(str(tmp_path / "tb"))
    read.Reload()
    losses = [(event.step, pytest.approx(event.loss, rel=1e-6)) for event in happened if type(event).__name__ == "Step"]
    assert [(scalar.step, scalar.value) for scalar in read.Scalars("train/loss")] == losses
    assert len(read.Scalars("eval/accuracy")) == 6 and "train/tokens_per_second" in read.Tags()["scalars"]
    changes = [event for event in happened if type(event).__name__ == "RankChanged"]
    assert [(scalar.step, scalar.value) for scalar in read.Scalars("rank/q")] == [(e.step, sum(e.ranks["q"])) for e in changes]
    assert len(changes) == 6 and [scalar.value for scalar in read.Scalars("kept/budget")] == [event.budget for event in changes]


def test_without_tensorboard_the_error_has_the_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(UsageError, match=r"pip install 'deltaloom\[tensorboard\]'"):
        TensorBoard(tmp_path / "tb")
    assert not (tmp_path / "tb").exists()


def test_the_report_imports_neither_torch_nor_tensorboard():
    code = (
        "import sys; from deltaloom.report import card, compare, page, tensorboard, terminal; "
        "found = {'torch', 'tensorboard', 'transformers'} & set(sys.modules); sys.exit(repr(sorted(found)) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
