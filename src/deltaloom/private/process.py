"""How processes of private tuning share a machine's cores: one thread each, and nobody waits by spinning.

Two processes with two threads each on two cores wait for one another in busy loops and run five times slower. What an OpenMP
library does is read from the environment when it is loaded: so children are given it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}


def shared_environment(base: Mapping[str, str] | None = None, *, threads: int = 1) -> dict[str, str]:
    """The environment for a child process that shares the cores with others."""
    numbers = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {**(os.environ if base is None else base), **PASSIVE, **numbers}
