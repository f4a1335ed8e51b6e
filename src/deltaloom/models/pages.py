"""Memory pages of a checkpoint that is mapped while it is read: given back as soon as what they hold has been quantised."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Iterable
from pathlib import Path

MAPS = Path("/proc/self/maps")


class MappedFiles:
    """The mappings of some files that this process makes from now on, while a model is read from them.

    Earlier mappings of the same files belong to models that may have been changed since. Where the system does not tell (other
    than Linux), nothing is given back.
    """

    def __init__(self, files: Iterable[str | Path]) -> None:
        self.files = {str(Path(file).resolve()) for file in files}
        self.earlier: list[tuple[int, int]] = []
        self.earlier = self.spans()

    def spans(self) -> list[tuple[int, int]]:
        """(address, bytes) of each new mapping of one of the files."""
        if not self.files or not MAPS.exists():
            return []
        found = []
        for line in MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] in self.files:
                first, last = (int(address, 16) for address in fields[0].split("-"))
                if not any(first < address + length and address < last for address, length in self.earlier):
                    found.append((first, last - first))
        return found

    def release(self) -> None:
        """Take the pages out of this process; what is read again comes from the file.

        Only while the mapped tensors are as they were read: a change of a private page would be lost with it.
        """
        advise = _madvise()
        if advise is None:
            return
        for address, length in self.spans():
            advise(address, length, mmap.MADV_DONTNEED)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).madvise
        _ = mmap.MADV_DONTNEED
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
