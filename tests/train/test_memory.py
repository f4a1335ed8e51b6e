from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from deltaloom.train import memory
from deltaloom.train.memory import PeakMemory, resident_bytes

CPU = torch.device("cpu")
KEPT_KERNELS = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
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


MANY_SHAPES = """
import os, torch, deltaloom
torch.set_num_threads(1)
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
weight = torch.ones(64, 64, dtype=torch.bfloat16)
def run(rows):
    torch.nn.functional.linear(torch.ones(rows, 64, dtype=torch.bfloat16), weight)
for rows in range(1, 40):
    run(rows)
before = resident()
for rows in range(40, 440):
    run(rows)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no oneDNN kernels here")
def test_kernels_of_shapes_that_are_gone_are_not_kept():
    environment = {name: value for name, value in os.environ.items() if name not in KEPT_KERNELS}
    done = subprocess.run([sys.executable, "-c", MANY_SHAPES], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 100  # 20 MiB; with torch's own limits 260


def test_a_limit_that_the_user_set_stays():
    code = f"import deltaloom, os; print(*[os.environ[name] for name in {KEPT_KERNELS!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | dict.fromkeys(KEPT_KERNELS, "77"))
    assert done.stdout.split() == ["77", "77"]


FREED = """
import torch
from deltaloom.train.memory import give_back_freed_memory, resident_bytes
assert give_back_freed_memory()
first = torch.ones(1 << 20)
del first  # by itself, glibc would from now on keep blocks of this size in its heap
before = resident_bytes(torch.device("cpu"))
pairs = [(torch.ones(1 << 20), torch.ones(1 << 8)) for _ in range(30)]  # 4 MiB each, with something small behind it
pairs = [small for _, small in pairs]
print(resident_bytes(torch.device("cpu")) - before >> 20)
"""


@linux
def test_freed_blocks_go_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30  # of 120 MiB
