"""How processes of private tuning share a machine's cores: one thread each, and nobody waits by spinning.

Two processes with two threads each on two cores wait for one another in busy loops and run five times slower. What an OpenMP
library does is read from the environment when it is loaded: so this comes before torch is imported, and children get it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}


def shared_environment(base: Mapping[str, str] | None = None, *, threads: int = 1) -> dict[str, str]:
    """The environment for a child process that shares the cores with others."""
    numbers = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {**(os.environ if base is None else base), **PASSIVE, **numbers}


def share_cores(*, threads: int = 1) -> None:
    """Make this process one that shares the cores; fully only if torch is not imported yet, and then for torch's own threads."""
    os.environ.update(shared_environment(threads=threads))
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)
