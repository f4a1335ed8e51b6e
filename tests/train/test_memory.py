from __future__ import annotations

import sys

import pytest
import torch

from deltaloom.train import memory
from deltaloom.train.memory import PeakMemory, resident_bytes

CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_the_peak_is_what_was_taken_since_although_given_back():
    big = torch.ones(16 << 20)  # 64 MB before: not counted
    meter = PeakMemory(CPU)
    more = torch.ones(24 << 20)
    del more
    peak = meter.peak()
    assert peak is not None
    assert 90e6 < peak < 140e6
    assert resident_bytes(CPU) > big.numel() * 4


def test_where_it_cannot_be_reset_the_peak_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "no" / "such" / "file")
    assert PeakMemory(CPU).peak() is None
