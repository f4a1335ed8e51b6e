"""Memory of training: the peak beyond the loaded model, and an allocator that gives back what is free."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path

import torch

MEMORY = Path("/proc/meminfo")
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))  # of a container, cgroup v2
STATUS, CLEAR, SIZES = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/self/statm")
RESET_PEAK = "5"  # resets VmHWM to the current resident size, see proc(5)
MMAP_THRESHOLD, BLOCK = -3, 1 << 20  # M_MMAP_THRESHOLD of mallopt(3)


class PeakMemory:
    """Measures from its making: on CUDA allocated bytes, on Linux resident bytes, elsewhere nothing.

    `shared`: others use the process's memory too, so that what is this run's is not known.
    """

    def __init__(self, device: torch.device, shared: bool = False) -> None:
        self.device = device
        self.start: int | None = None
        if shared:
            return
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
        elif sys.platform == "linux" and _reset_resident_peak():
            self.start = _status_bytes("VmRSS")

    def peak(self) -> int | None:
        """The highest use since the start, less the use at the start, in bytes; None where it cannot be measured."""
        if self.start is None:
            return None
        if self.device.type == "cuda":
            return max(0, torch.cuda.max_memory_allocated(self.device) - self.start)
        high = _status_bytes("VmHWM")
        return None if high is None else max(0, high - self.start)


def give_back_freed_memory() -> bool:
    """Have glibc return each freed block of a MiB or more to the system at once; whether it will. For the whole process.

    By default it keeps up to 32 MiB each in its heap, where steps of other widths do not find room: a quarter of the peak.
    """
    if sys.platform != "linux":
        return False
    try:
        return bool(ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, BLOCK))
    except AttributeError:  # another C library
        return False


def resident_bytes(device: torch.device) -> int:
    """Memory in use now: allocated on CUDA, resident on Linux, 0 where it is not known."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(SIZES.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if sys.platform == "linux" else 0


def free_bytes(device: torch.device) -> int | None:
    """Memory that a process may still take, within a container's limit; None where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", MEMORY.read_text(), re.M)
        free = None if found is None else int(found[1]) * 1024
    except OSError:
        return None
    try:
        most, used = (path.read_text().strip() for path in LIMITS)
    except OSError:
        return free
    return free if most == "max" or free is None else min(free, max(0, int(most) - int(used)))


def _reset_resident_peak() -> bool:
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:  # some containers forbid it: the peak is then unknown, not wrong
        return False
    return True


def _status_bytes(key: str) -> int | None:
    found = re.search(rf"^{key}:\s+(\d+) kB", STATUS.read_text(), re.M)
    return int(found[1]) * 1024 if found else None
